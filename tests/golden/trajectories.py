"""Trainings whose results are recorded: a change of structure must not change a bit of them.

python -m tests.golden.trajectories [NAMES as pytest -k]

records them anew, on purpose, in this folder: parameters as a hash and a few values, and states saved half way.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hvd_accordion import (
    QSGD,
    Accordion,
    AccordionBatchSize,
    AccordionSteps,
    Auto,
    Dense,
    EFSignSGD,
    LocalSteps,
    PowerSGD,
    TopK,
)
from tests.parallel import reference

HERE = Path(__file__).parent
STEPS, HALF, RATE = 30, 14, 0.3
EXACT = Accordion(TopK(0.2), TopK(0.02), interval=1, eta=0.2, norm="exact")
WITH_AUTO = Accordion(Dense(), Auto((PowerSGD(2), TopK(0.05))), interval=4, unit="steps", eta=0.15)
CASES: dict[str, dict[str, Any]] = {  # arguments of the DistributedOptimizer
    "none": {},
    **{name: {"compression": spec} for name, spec in reference.SPECS.items()},
    "accordion": {"compression": Accordion(PowerSGD(4), PowerSGD(1), interval=3, unit="steps", eta=0.15)},
    "accordion-exact": {"compression": EXACT, "steps_per_epoch": 5},
    "accordion-kinds": {"compression": Accordion(Dense(), TopK(0.1), interval=3, unit="steps", eta=0.15)},
    "accordion-auto": {"compression": WITH_AUTO},
    "auto": {"compression": Auto((PowerSGD(2), TopK(0.02)))},
    "per-layer": {"compression": {"w1": PowerSGD(2), "w*": TopK(0.1), "*": Dense()}},
    "batch": {
        "compression": PowerSGD(2),
        "batch_size": AccordionBatchSize(16, 32, eta=1e3, interval=1, warmup=1),
        "steps_per_epoch": 6,
    },
}
LOCAL: dict[str, dict[str, Any]] = {  # of torch alone
    "local": {"compression": EFSignSGD(), "local_steps": LocalSteps(4)},
    "local-fragments": {"compression": TopK(0.1), "local_steps": LocalSteps(4, fragments=2, residual_decay=0.9)},
    "local-delay": {"compression": QSGD(1), "local_steps": LocalSteps(5, delay=2)},
    "local-accordion": {
        "compression": PowerSGD(2),
        "local_steps": LocalSteps(AccordionSteps(2, 5, interval=6, unit="steps", eta=0.3)),
    },
}
# Keras traces each for seconds: with GOLDEN_SUBSET=1, which tests/parallel sets unless GOLDEN_WHOLE=1, these and all SAVED
SUBSET = ["none", "bf16", "topk-two-step", "qsgd127-l2", "powersgd2-twice", "accordion-kinds", "per-layer"]
SAVED = ["powersgd4", "topk", "randomk", "accordion", "accordion-exact", "auto", "batch"]


def weights() -> dict[str, np.ndarray]:
    """Two layers of tanh with biases, the second with a weight of three axes, and a linear third."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 24), "b1": (24,), "w2": (24, 6, 4), "b2": (24,), "w3": (24, 12), "b3": (12,)}
    return {k: (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32) for k, shape in shapes.items()}


def batch(step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng((step, rank)).standard_normal((8, 16))
    return x.astype(np.float32), np.tanh(x @ np.random.default_rng(1).standard_normal((16, 12))).astype(np.float32)


def fingerprint(framework: str) -> str:
    """What decides the last bits: the framework's version and the processor's instructions."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    vectors = sorted(flag for flag in flags.split() if flag.startswith(("avx", "fma", "amx")))
    return " ".join([framework, platform.machine(), *vectors])


class Golden:
    """The records of one framework's file."""

    def __init__(self, name: str, fingerprint: str) -> None:
        self.file, self.fingerprint = HERE / f"{name}.json", fingerprint
        self.recording = "GOLDEN_RECORD" in os.environ
        self.records = json.loads(self.file.read_text()) if self.file.exists() else {}

    def check(self, case: str, values: dict[str, np.ndarray], **facts: Any) -> None:
        """AssertionError unless the values are the recorded ones: to the bit where they were recorded, else nearly."""
        flat = np.concatenate([v.ravel() for v in values.values()])
        sample = flat[:: max(1, len(flat) // 24)].astype(float).round(7).tolist()
        found = {"hash": hashlib.sha256(flat.tobytes()).hexdigest()[:16], "sample": sample, **facts}
        if self.recording:
            self.records = {**self.records, case: found, "recorded on": self.fingerprint}
            self.file.write_text(
                "{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.records.items()) + "}" + "\n"
            )
            return
        expected = self.records[case]
        if self.records["recorded on"] == self.fingerprint:
            assert found == expected
        else:
            np.testing.assert_allclose(sample, expected["sample"], atol=0.02)


def state_file(framework: str, case: str, rank: int) -> Path:
    return HERE / "states" / f"{framework}.{case}.{rank}"


if __name__ == "__main__":
    from tests.parallel.launcher import worker

    (HERE / "states").mkdir(exist_ok=True)
    for name in ("torch/golden", "tensorflow/keras_golden"):
        print(worker(name, ranks=2, timeout=900, only=" ".join(sys.argv[1:]), GOLDEN_RECORD="1"))

"""What the workers of both frameworks compare with; no framework is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvd_accordion import BF16, FP16, QSGD, Dense, EFSignSGD, PowerSGD, RandomK, TopK
from hvd_accordion.comm import simulation
from hvd_accordion.compression import Context, exchange
from hvd_accordion.ops import numpy as ops

SPECS = {
    "dense": Dense(),
    "fp16": FP16(),
    "bf16": BF16(),
    "topk": TopK(0.05),
    "topk-two-step": TopK(0.05, values="bfloat16", algorithm="two_step"),
    "randomk": RandomK(0.1),
    "qsgd1": QSGD(1),
    "qsgd7": QSGD(7),
    "qsgd127-l2": QSGD(127, norm="l2"),
    "powersgd1": PowerSGD(1),
    "powersgd4": PowerSGD(4),
    "powersgd2-twice": PowerSGD(2, iterations=2, start_after=3),
    "signs": EFSignSGD(),
    "no-feedback": PowerSGD(2, error_feedback=False, warm_start=False),
}
SHAPES = {"a": (40, 36), "b": (64, 3, 3, 5), "c": (40, 36)}

Grads = dict[str, np.ndarray]


def gradients(step: int, ranks: int) -> list[Grads]:
    """Of each rank, with a falling spectrum, as gradients have: noise alone has no leading directions."""
    rng = np.random.default_rng(step)
    everyones = []
    for _ in range(ranks):
        one = {}
        for name, shape in SHAPES.items():
            u, s, v = np.linalg.svd(rng.standard_normal((shape[0], int(np.prod(shape[1:])))), full_matrices=False)
            one[name] = ((u * np.geomspace(1, 1e-2, len(s))) @ v).reshape(shape).astype(np.float32)
        everyones.append(one)
    return everyones


def simulated(
    spec: Any, ranks: int, steps: int, decay: float = 1.0
) -> Iterator[tuple[list[Grads], Mapping[str, np.ndarray]]]:
    """Step by step: every rank's gradients, and the means that a cluster in one process comes to."""
    names = tuple(reversed(SHAPES))  # the order of backward
    residual: list[Any] = [[np.zeros(SHAPES[k], np.float32) for k in names] for _ in range(ranks)]
    if not spec.error_feedback:
        residual = [None] * ranks
    memory: list[Any] = [[{} for _ in names] for _ in range(ranks)]
    for step in range(steps):
        grads = gradients(step, ranks)
        if not spec.active(step):
            yield grads, {k: np.mean([g[k] for g in grads], axis=0) for k in names}
            continue
        rounds = []
        for rank in range(ranks):
            context = Context(names, "float32", step, 0, rank, ranks)
            mine = [grads[rank][k] for k in names]
            rounds.append(exchange(spec, ops, mine, residual[rank], memory[rank], context, residual_decay=decay))
        done, _ = simulation.run(rounds)
        residual, memory = [d.residual for d in done], [d.memory for d in done]
        yield grads, dict(zip(names, done[0].mean, strict=True))


def on_the_wire() -> int:
    """Bytes that the loopback interface has sent, of all ranks."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    raise RuntimeError("no loopback interface")

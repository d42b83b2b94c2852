"""One small training in numpy terms, for torch and TensorFlow to do alike; no framework is imported here."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hvd_accordion import Accordion, Dense, PowerSGD, TopK
from tests.parallel import reference

SPECS = {
    "none": None,
    **reference.SPECS,
    "accordion": Accordion(PowerSGD(4), PowerSGD(1), interval=3, unit="steps", eta=0.15),
    "accordion-topk": Accordion(TopK(0.2), TopK(0.02), interval=3, unit="steps", eta=0.15),
    # (under an Accordion over QSGD the draws differ: torch quantises all layers of a level as one vector, a graph each)
    "accordion-kinds": Accordion(Dense(), TopK(0.1), interval=3, unit="steps", eta=0.15),
}
STEPS, RATE = 20, 0.5


def dtype(name: str) -> str:
    """float64 where the last bit of a float32 can decide whether an entry travels, how it is rounded, or its sign."""
    return "float64" if any(kind in name for kind in ("qsgd", "topk", "signs", "kinds")) else "float32"


def weights(dtype: str) -> dict[str, np.ndarray]:
    """Two layers of tanh with biases, the second with a weight of three axes, and a linear third."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 8, 6), "b2": (48,), "w3": (48, 40), "b3": (40,)}
    return {name: (rng.standard_normal(shape) / shape[0] ** 0.5).astype(dtype) for name, shape in shapes.items()}


def batch(step: int, rank: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((step, rank))
    x = rng.standard_normal((16, 32))
    return x.astype(dtype), np.tanh(x @ np.random.default_rng(1).standard_normal((32, 40))).astype(dtype)


def file(name: str) -> Path:
    return Path(os.environ["PARITY"]) / f"{name}.npz"

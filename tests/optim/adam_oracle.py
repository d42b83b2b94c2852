"""1-bit Adam and 0/1 Adam of n ranks in plain numpy, written from the papers' formulas, and a problem for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHAPES = {"weight": (40, 50), "bias": (30,)}
RATIO = 0.05  # of TopK, on the matrix alone


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradient(x: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    """Of a quadratic with a centre and curvatures of the rank's own, and noise. The last column has none."""
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        own, noise = np.random.default_rng([rank, i]), np.random.default_rng([rank, i, step])
        curvature, centre = own.uniform(0.5, 1.5, shape), own.normal(size=shape)
        found[name] = curvature * (x[name] - centre) + 0.3 * noise.normal(size=shape)
        if name == "weight":
            found[name][:, -1] = 0
    return found


def rate(step: int) -> float:
    """Of a schedule that warms up, is steady, and ends at 0."""
    return 0.02 * min(1.0, (step + 1) / 4, max(0.0, (28 - step) / 8))


def top(v: np.ndarray) -> np.ndarray:
    if v.ndim == 1:
        return v
    flat = v.reshape(-1)
    kept = np.argsort(-np.abs(flat), kind="stable")[: round(RATIO * flat.size)]
    sent = np.zeros_like(flat)
    sent[kept] = flat[kept]
    return sent.reshape(v.shape)


@dataclass
class Oracle:
    """Ranks in lock step. Args: as the optimizers'; `dense`, `exchanges`: numbers of the steps of these kinds."""

    ranks: int
    dense: set[int]
    exchanges: set[int]
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    compressed: bool = True
    x: list[dict[str, np.ndarray]] = field(default_factory=list)  # of each rank

    def run(self, steps: int) -> list[list[dict[str, np.ndarray]]]:
        """Parameters of each rank after each step."""
        n, b1, b2 = range(self.ranks), self.beta1, self.beta2
        self.x = [start() for _ in n]
        zeros = lambda: {name: np.zeros(shape) for name, shape in SHAPES.items()}  # noqa: E731
        m, e, v, updates = [zeros() for _ in n], [zeros() for _ in n], zeros(), 0
        since: list[tuple[float, float, list[Any]]] = []  # rate, decay and moments of each step since the last exchange
        anchor, history = start(), []
        for t in range(steps):
            lr = rate(t)
            gamma, decay = lr / (1 - b1 ** (t + 1)), 1 - lr * self.weight_decay
            g = [gradient(self.x[r], r, t) for r in n]
            updates += t in self.dense
            for name in SHAPES:
                if t in self.dense:
                    mean = sum(g[r][name] for r in n) / self.ranks
                    v[name] = b2 * v[name] + (1 - b2) * mean**2
                    for r in n:
                        m[r][name] = b1 * m[r][name] + (1 - b1) * mean
                else:
                    for r in n:
                        m[r][name] = np.where(v[name] > 0, b1 * m[r][name] + (1 - b1) * g[r][name], 0)
            below = {name: np.sqrt(v[name] / (1 - b2**updates)) + self.eps for name in SHAPES}
            since.append((gamma, decay, [dict(one) for one in m]))
            for r in n:
                self.x[r] = {k: decay * x - gamma * m[r][k] / below[k] for k, x in self.x[r].items()}
            if t in self.exchanges:
                self._exchange(since, m, e, v, below, anchor)
            if t in self.exchanges | self.dense:
                anchor, since = {k: x.copy() for k, x in self.x[0].items()}, []
            history.append([dict(x) for x in self.x])
        return history

    def _exchange(self, since, m, e, v, below, anchor) -> None:
        total = sum(gamma for gamma, _, _ in since)
        decay = np.prod([d for _, d, _ in since])
        for name in SHAPES:
            sent = []
            for r in range(self.ranks):
                if total:
                    u = sum(gamma * moments[r][name] for gamma, _, moments in since) / total
                else:
                    u = since[-1][2][r][name]
                if self.compressed:
                    u = u + e[r][name]
                    sent.append(top(u))
                    e[r][name] = u - sent[r]
                else:
                    sent.append(u)
            mean = np.where(v[name] > 0, sum(sent) / self.ranks, 0)
            for r in range(self.ranks):
                m[r][name] = mean.copy()
                self.x[r][name] = decay * anchor[name] - total * mean / below[name]

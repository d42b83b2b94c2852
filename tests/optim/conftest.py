"""Small problems with different data on each rank, and the methods' classes on simulated ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hvd_accordion.optim import methods as published
from hvd_accordion.optim.simulated import Simulated


class SimulatedWorkers(Simulated):
    """`Simulated` as the base of a method's class, called as ECLK(x, size=4, compression=..., ...)."""

    def __init__(self, x, compression, make, seed, size, steps_per_epoch=None) -> None:
        super().__init__(make, x, compression, size, seed, steps_per_epoch)


@pytest.fixture(scope="session")
def methods() -> dict[str, Any]:
    names = ("ECLK", "LKatyusha", "ECSGD", "ECLSVRG", "LSVRG", "EF21")
    return {name: type(name, (getattr(published, name), SimulatedWorkers), {}) for name in names}


@dataclass(frozen=True)
class Logistic:
    """f^tau(x) = mean_j log(1 + exp(-b_j a_j x)) + (mu / 2) ||x||^2 over the rows of rank tau, one vector x."""

    rows: np.ndarray  # [ranks, rows, d]
    labels: np.ndarray  # [ranks, rows]
    mu: float

    def gradient(self, x, rank, rows=slice(None)):
        a, b = self.rows[rank, rows], self.labels[rank, rows]
        return -(b / (1 + np.exp(b * (a @ x)))) @ a / len(b) + self.mu * x

    def mean_gradient(self, x):
        return np.mean([self.gradient(x, rank) for rank in range(len(self.rows))], axis=0)

    def oracles(self, rows=slice(None)):
        return [lambda x, r=rank: [self.gradient(x[0], r, rows)] for rank in range(len(self.rows))]

    @property
    def smoothness(self) -> float:
        a = self.rows.reshape(-1, self.rows.shape[-1])
        return float(np.linalg.eigvalsh(a.T @ a / len(a))[-1]) / 4 + self.mu


@pytest.fixture(scope="session")
def logistic() -> Logistic:
    """Four ranks with different centres, 12 rows of 20 features each."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(4, 12, 20)) + rng.normal(size=(4, 1, 20))
    return Logistic(rows, np.where(rows @ rng.normal(size=20) + rng.normal(size=(4, 12)) > 0, 1.0, -1.0), 0.01)


@dataclass(frozen=True)
class Quadratic:
    """f^tau(x) = (1/2) sum_ij h_ij (x_ij - c^tau_ij)^2, one matrix x; the mean's minimum is the mean of the centres."""

    curvature: np.ndarray
    centres: np.ndarray  # [ranks, n, m]

    def oracles(self):
        return [lambda x, c=centre: [self.curvature * (x[0] - c)] for centre in self.centres]

    def gap(self, x) -> float:
        return float((self.curvature * (x[0] - self.centres.mean(0)) ** 2).sum() / 2)


@pytest.fixture(scope="session")
def quadratic() -> Quadratic:
    """Two ranks, 16 x 12, curvatures from 0.3 to 1."""
    rng = np.random.default_rng(3)
    return Quadratic(rng.uniform(0.3, 1.0, (16, 12)), rng.normal(size=(2, 16, 12)))

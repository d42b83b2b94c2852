"""The estimate of L against exact eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion.ops import numpy as ops
from hvd_accordion.optim import smoothness


def test_quadratic_gives_the_largest_eigenvalue():
    """Two coupled parameters with one Hessian."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(18, 18))
    hessian = root @ root.T

    def gradient(x):
        flat = hessian @ np.concatenate([x[0].ravel(), x[1]])
        return [flat[:12].reshape(3, 4), flat[12:]]

    estimated = smoothness.estimate(ops, [np.ones((3, 4)), np.zeros(6)], gradient, 200, seed=0)
    assert estimated == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=0.01)
    assert estimated <= np.linalg.eigvalsh(hessian)[-1] * (1 + 1e-6)


def test_logistic_regression_at_zero_gives_l(logistic):
    estimated = smoothness.estimate(ops, [np.zeros(20)], lambda x: [logistic.mean_gradient(x[0])], 100, seed=1)
    assert estimated == pytest.approx(logistic.smoothness, rel=0.02)


def test_flat_functions_and_single_precision():
    assert smoothness.estimate(ops, [np.zeros(5)], lambda x: [0 * x[0]], 10, seed=0) == 0.0
    x = [np.zeros(5, np.float32)]
    assert smoothness.estimate(ops, x, lambda x: [np.float32(3) * x[0]], 10, seed=0) == pytest.approx(3, rel=1e-3)

"""One step of each update, with numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion.ops import numpy as ops
from hvd_accordion.optim.iterates import Descent, Katyusha, Regulariser


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_prox_minimises(l1, l2):
    """t psi(u) + (u - x)^2 / 2 is not smaller at any nearby point."""
    psi, t = Regulariser(l1, l2), 0.7
    x = np.array([-2.0, -0.3, 0.0, 0.2, 1.5])
    (u,) = psi.prox(ops, [x], t)

    def value(u):
        return t * (l1 * np.abs(u) + l2 / 2 * u * u) + (u - x) ** 2 / 2

    for shift in np.linspace(-1, 1, 41):
        assert (value(u) <= value(u + shift) + 1e-15).all()


def test_katyusha_by_hand():
    """L1 = 2, mu = 1, theta1 = theta2 = 1/4: eta = 0.8, eta sigma = 0.2."""
    katyusha = Katyusha(2.0, 1.0, 0.25, 0.25)
    assert katyusha.eta == pytest.approx(0.8)
    assert katyusha.step == pytest.approx(0.4)
    points = {"y": [np.array([5.0])], "z": [np.array([3.0])], "w": [np.array([7.0])]}
    for refresh, w in ((False, 7.0), (True, 5.0)):
        x, points_after = katyusha.advance(ops, [np.array([1.0])], points, [np.array([0.8])], refresh)
        z = (0.2 * 1 + 3 - 0.8) / 1.2
        y = 1 + 0.25 * (z - 3)
        assert points_after["z"][0] == pytest.approx(z)
        assert points_after["y"][0] == pytest.approx(y)
        assert points_after["w"][0] == w  # y before the step
        assert x[0] == pytest.approx(0.25 * z + 0.25 * w + 0.5 * y)


def test_descent_by_hand():
    descent = Descent(0.1, Regulariser(l1=1.0))
    x, points_after = descent.advance(ops, [np.array([1.0, 0.05])], {"w": [np.zeros(2)]}, [np.array([0.2, 0.0])], True)
    assert np.allclose(x[0], [0.7, 0.0])
    assert np.array_equal(points_after["w"][0], [1.0, 0.05])

"""Default arguments against their formulas; errors for invalid arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_accordion import QSGD, Dense, PowerSGD, RandomK, TopK

X = [np.zeros((10, 30))]


def build(methods, name="ECLK", **arguments):
    return methods[name](X, size=4, **{"smoothness": 2.0, **arguments}).method


def test_defaults_under_random_k(methods):
    """p = 3 K/d; L1 = 4 L; theta1 = sqrt(mu / (L1 p)) theta2."""
    method = build(methods, compression=RandomK(0.1), strong_convexity=0.01)
    assert method.p == pytest.approx(0.3)
    assert method.iterates.L1 == 8.0
    assert method.iterates.theta2 == 0.5
    assert method.iterates.theta1 == pytest.approx(math.sqrt(0.01 / (8 * 0.3)) / 2)
    assert method.iterates.eta == pytest.approx(0.5 / (1.5 * method.iterates.theta1))


def test_defaults_under_top_k(methods):
    top = TopK(0.1, algorithm="allgather")
    method = build(methods, compression=top, strong_convexity=0.01)
    payload = sum(nbytes for _, nbytes in top.messages((10, 30), "float64", 4))
    assert method.p == pytest.approx(3 * payload / (8 * 300))
    assert method.iterates.L1 == 2.0
    assert build(methods, compression=top, shift="learnt").p == pytest.approx(0.1)
    assert build(methods, "LKatyusha").p == 1.0


def test_theta1_is_at_most_theta2_and_lr_gives_the_smoothness(methods):
    assert build(methods, compression=Dense(), strong_convexity=2.0, p=0.1).iterates.theta1 == 0.5
    by_lr = build(methods, compression=Dense(), smoothness=None, lr=0.3, theta1=0.2).iterates
    assert by_lr.step == pytest.approx(0.3)


@pytest.mark.parametrize(("p", "seed"), [(0.05, 0), (0.5, 1)])
def test_coins_depend_on_seed_and_step_only(methods, p, seed):
    first, second = (build(methods, compression=TopK(0.1), p=p, seed=seed) for _ in range(2))
    tossed = [first.coin(step) for step in range(4000)]
    assert tossed == [second.coin(step) for step in range(4000)]
    assert abs(np.mean(tossed) - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert tossed != [build(methods, compression=TopK(0.1), p=p, seed=seed + 1).coin(step) for step in range(4000)]
    assert all(build(methods, compression=TopK(0.1), p=1).coin(step) for step in range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strong_convexity": -0.1}, r"strong_convexity must be .*\[0, .*got -0.1"),
        ({"strong_convexity": 3.0}, r"strong_convexity must be .*\[0, 2\], got 3.0"),
        ({"smoothness": 0.0}, r"smoothness must be .*\(0, .*got 0.0"),
        ({"smoothness": -1}, r"smoothness must be .*got -1"),
        ({"smoothness": math.nan}, r"smoothness must be .*got nan"),
        ({"smoothness": None}, r"smoothness, the constant L of f, must be given"),
        ({"smoothness_factor": 0.0}, r"smoothness_factor must be .*got 0.0"),
        ({"p": 0.0}, r"p must be .*\(0, 1\], got 0.0"),
        ({"p": 1.5}, r"p must be .*\(0, 1\], got 1.5"),
        ({"theta1": 0.0}, r"theta1 must be .*\(0, 1\), got 0.0"),
        ({"theta1": 1.0}, r"theta1 must be .*\(0, 1\), got 1.0"),
        ({"theta2": 1.0}, r"theta2 must be .*\(0, 1\), got 1.0"),
        ({"theta1": 0.6}, r"theta1 \+ theta2 must be at most 1, got 0.6 \+ 0.5"),
        ({"lr": 0.1}, r"lr=0.1 replaces smoothness and requires theta1"),
        ({"l1": -1.0}, r"l1 must be .*got -1.0"),
        ({"l2": math.inf}, r"l2 must be .*got inf"),
        ({"shift": "none"}, r"shift must be one of 'refresh', 'learnt', got 'none'"),
        ({"compression": QSGD(3, error_feedback=False)}, r"compression must be a contraction.*error_feedback=False"),
        ({"compression": {"0": RandomK(0.1, error_feedback=False)}}, r"compression must be a contraction"),
        ({"compression": {"weights": TopK(0.1)}}, r"the glob 'weights' matches no parameter"),
    ],
)
def test_values_out_of_range_raise_value_error(methods, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(methods, **{"compression": PowerSGD(1), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"), [({"p": "often"}, "p must be"), ({"compression": "topk"}, "compression")]
)
def test_wrong_types_raise_type_error(methods, arguments, message):
    with pytest.raises(TypeError, match=message):
        build(methods, **{"compression": PowerSGD(1), **arguments})


@pytest.mark.parametrize("name", ["ECSGD", "ECLSVRG", "LSVRG", "EF21"])
def test_descent_takes_lr_or_smoothness(methods, name):
    assert build(methods, name).iterates.lr == 0.5
    assert build(methods, name, lr=0.1, smoothness=None).iterates.lr == 0.1
    with pytest.raises(ValueError, match="lr or smoothness must be given"):
        build(methods, name, smoothness=None)
    with pytest.raises(ValueError, match=r"lr must be .*got -1"):
        build(methods, name, lr=-1)

"""The methods on simulated ranks against an independent implementation of the mathematics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hvd_accordion import QSGD, Dense, PowerSGD, RandomK, TopK

TOP = TopK(0.05, algorithm="allgather")
WIDE = TopK(0.2, algorithm="allgather")  # entries of similar magnitude need a large ratio or small steps


@pytest.mark.parametrize("l1", [0.0, 0.02])
@pytest.mark.parametrize("shift", ["refresh", "learnt"])
def test_without_compression_eclk_is_l_katyusha(methods, logistic, shift, l1):
    """L-Katyusha over samples, from arXiv 1901.08689, with ECLK's sigma = mu / (2 L1)."""
    L, mu, theta1, theta2, p = logistic.smoothness, logistic.mu, 0.1, 0.4, 0.2
    eclk = methods["ECLK"](
        [np.zeros(20)],
        Dense(),
        size=4,
        smoothness=L,
        strong_convexity=mu,
        theta1=theta1,
        theta2=theta2,
        p=p,
        l1=l1,
        shift=shift,
        smoothness_factor=1.5,
        seed=2,
    )
    L *= 1.5
    eta = theta2 / ((1 + theta2) * theta1)
    sigma = mu / (2 * L)
    x = y = z = w = np.zeros(20)
    full, moves = logistic.oracles(), 0
    for step in range(500):
        rows = slice(step % 4 * 3, step % 4 * 3 + 3)
        estimate = logistic.mean_gradient(w)
        for rank in range(4):
            estimate = estimate + (logistic.gradient(x, rank, rows) - logistic.gradient(w, rank, rows)) / 4
        u = (eta * sigma * x + z - eta / L * estimate) / (1 + eta * sigma)
        threshold = eta * l1 / (L * (1 + eta * sigma))
        previous, z = z, np.where(np.abs(u) > threshold, u - threshold * np.sign(u), 0.0)
        y, old = x + theta1 * (z - previous), y
        w, moves = (old, moves + 1) if eclk.method.coin(step) else (w, moves)
        x = theta1 * z + theta2 * w + (1 - theta1 - theta2) * y

        eclk.step(logistic.oracles(rows), full)
        assert np.abs(eclk.x[0] - x).max() < 1e-12
        assert np.abs(eclk.solution[0] - y).max() < 1e-12
    assert 60 < moves < 140


@pytest.mark.parametrize("shift", ["refresh", "learnt"])
@pytest.mark.parametrize("spec", [TOP, RandomK(0.05)], ids=str)
def test_virtual_iterates_follow_the_uncompressed_method(methods, logistic, spec, shift):
    """With c = 1 / (1 + eta sigma) and z' = z - c e, x' = x - c e: z'+ = c (eta sigma x' + z' - eta / L1 grad f(x))."""
    L, mu = logistic.smoothness, logistic.mu
    eclk = methods["ECLK"]([np.zeros(20)], spec, size=4, smoothness=L, strong_convexity=mu, shift=shift)
    eta, gamma, L1 = eclk.method.iterates.eta, eclk.method.iterates.step, eclk.method.iterates.L1
    eta_sigma = eta * mu / (2 * L1)
    c = 1 / (1 + eta_sigma)
    oracles, largest = logistic.oracles(), 0.0
    x, z, e = np.zeros(20), np.zeros(20), np.zeros(20)
    for _ in range(200):
        eclk.step(oracles, oracles)
        expected = c * (eta_sigma * (x - c * e) + z - c * e - gamma * logistic.mean_gradient(x))
        e = np.mean([worker.channels["fed"].residual["0"].reshape(20) for worker in eclk.workers], axis=0)
        x, z = eclk.x[0], eclk.workers[0].points["z"][0]
        largest = max(largest, float(np.abs(e).max()))
        assert np.abs(z - c * e - expected).max() < 1e-10
    assert largest > 1e-3  # the residuals are not zero


@pytest.mark.parametrize(
    ("spec", "factor"),
    [(PowerSGD(1), 2), (QSGD(3), 1), (TopK(0.1, algorithm="two_step"), 1), (RandomK(0.25), 4)],
    ids=str,
)
def test_every_family_converges_on_a_quadratic(methods, quadratic, spec, factor):
    eclk = methods["ECLK"](
        [np.zeros((16, 12))], spec, size=2, smoothness=1.0, strong_convexity=0.3, smoothness_factor=factor
    )
    assert eclk.workers[0].controller.specs() == {"0": spec}
    oracles = quadratic.oracles()
    for _ in range(300):
        eclk.step(oracles, oracles)
    assert quadratic.gap(eclk.solution) < 1e-10


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LKatyusha", {"smoothness": 1.0, "strong_convexity": 0.3}),
        ("ECLSVRG", {"compression": WIDE, "lr": 0.3}),
        ("ECLSVRG", {"compression": WIDE, "lr": 0.3, "shift": "learnt"}),
        ("LSVRG", {"smoothness": 1.0}),
        ("EF21", {"compression": WIDE, "lr": 0.3}),
    ],
)
def test_siblings_converge(methods, quadratic, name, arguments):
    method = methods[name]([np.zeros((16, 12))], size=2, **arguments)
    oracles = quadratic.oracles()
    for _ in range(150):
        method.step(oracles, oracles)
    assert quadratic.gap(method.solution) < 1e-10


def test_ec_gd_leaves_the_minimum_and_eclk_stays(methods, quadratic):
    """The gradients of ranks with different data do not vanish at the minimum; only shifts remove their compression error."""
    centres = np.random.default_rng(4).normal(
        size=(3, 16, 12)
    )  # three ranks: two opposite gradients would cancel at the minimum
    problem = replace(quadratic, centres=centres)
    best, oracles = [centres.mean(0)], problem.oracles()
    gaps = {}
    for name, arguments in {
        "ECSGD": {"lr": 0.3},
        "ECLSVRG": {"lr": 0.3},
        "ECLK": {"smoothness": 1.0, "strong_convexity": 0.3},
    }.items():
        method = methods[name](best, WIDE, size=3, **arguments)
        for _ in range(60):
            method.step(oracles, oracles)
        gaps[name] = problem.gap(method.solution)
    assert gaps["ECSGD"] > 1e-3
    assert max(gaps["ECLSVRG"], gaps["ECLK"]) < 1e-20


def test_no_strong_convexity(methods, quadratic):
    """mu = 0: flat directions keep their value, the others converge."""
    curvature = quadratic.curvature.copy()
    curvature[::3] = 0.0
    oracles = [lambda x, c=centre: [curvature * (x[0] - c)] for centre in quadratic.centres]
    eclk = methods["ECLK"]([np.ones((16, 12))], WIDE, size=2, smoothness=1.0, strong_convexity=0.0)
    for _ in range(400):
        eclk.step(oracles, oracles)
    assert (curvature * (eclk.solution[0] - quadratic.centres.mean(0)) ** 2).sum() < 1e-6
    assert (eclk.solution[0][::3] == 1.0).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ECLK", {"smoothness": 1.0, "strong_convexity": 1.0}), ("ECLSVRG", {"lr": 0.3}), ("EF21", {"lr": 0.3})],
)
def test_l1_gives_the_soft_threshold(methods, quadratic, name, arguments):
    """The minimum of (1/2) ||x - c||^2 + l1 ||x||_1 + (l2 / 2) ||x||^2 is soft(c, l1) / (1 + l2), with exact zeros."""
    oracles = [lambda x, c=centre: [x[0] - c] for centre in quadratic.centres]
    c = quadratic.centres.mean(0)
    expected = np.sign(c) * np.maximum(np.abs(c) - 0.3, 0) / 1.5
    method = methods[name]([np.zeros((16, 12))], WIDE, size=2, l1=0.3, l2=0.5, **arguments)
    for _ in range(200):
        method.step(oracles, oracles)
    assert np.abs(method.solution[0] - expected).max() < 1e-8
    assert ((method.solution[0] == 0) == (expected == 0)).all()


@pytest.mark.parametrize("shift", ["refresh", "learnt"])
def test_ranks_stay_bit_equal_and_move_w_together(methods, logistic, shift):
    eclk = methods["ECLK"]([np.zeros(20)], TOP, size=4, smoothness=1.0, strong_convexity=0.01, p=0.3, shift=shift)
    oracles, moves = logistic.oracles(), []
    for _ in range(100):
        eclk.step(oracles, oracles)
        first = eclk.workers[0]
        for worker in eclk.workers[1:]:
            assert worker.moved == first.moved
            assert all(np.array_equal(worker.points[k][0], first.points[k][0]) for k in "yzw")
            assert np.array_equal(worker.h[0], first.h[0])
        moves.append(first.moved)
    assert 15 < sum(moves) < 45


@pytest.mark.parametrize("shift", ["refresh", "learnt"])
def test_the_shift_is_the_mean_of_the_ranks_shifts(methods, logistic, shift):
    eclk = methods["ECLK"]([np.zeros(20)], TOP, size=4, smoothness=1.0, strong_convexity=0.01, p=0.1, shift=shift)
    oracles = logistic.oracles()
    for _ in range(60):
        eclk.step(oracles, oracles)
        own = [worker.shift if shift == "learnt" else worker.full for worker in eclk.workers]
        assert np.abs(eclk.workers[0].h[0] - np.mean([v[0] for v in own], axis=0)).max() < 1e-12

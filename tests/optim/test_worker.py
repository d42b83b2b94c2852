"""A worker: checkpoints, regimes, the divergence warning, calls of the gradient functions, messages of a round."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

from hvd_accordion import QSGD, Accordion, PowerSGD, TopK

TOP = TopK(0.1, algorithm="allgather")
FAMILY = [
    ("ECLK", {"compression": TOP, "smoothness": 1.0, "strong_convexity": 0.3}),
    ("ECLK", {"compression": TOP, "smoothness": 1.0, "shift": "learnt"}),
    ("ECLK", {"compression": PowerSGD(1), "smoothness": 2.0, "l1": 0.1}),
    ("ECLK", {"compression": QSGD(3), "smoothness": 1.0}),
    ("ECLK", {"compression": Accordion(PowerSGD(2), PowerSGD(1), interval=4, unit="steps"), "smoothness": 2.0}),
    ("LKatyusha", {"smoothness": 1.0}),
    ("ECSGD", {"compression": TOP, "lr": 0.1}),
    ("ECLSVRG", {"compression": TOP, "lr": 0.1, "shift": "learnt"}),
    ("EF21", {"compression": PowerSGD(1), "lr": 0.1}),
]


@pytest.mark.parametrize(("name", "arguments"), FAMILY)
def test_resumed_steps_are_bit_equal(methods, quadratic, name, arguments):
    def new():
        return methods[name]([np.zeros((16, 12))], size=2, seed=3, **arguments)

    def run(method, rounds):
        for _ in range(rounds):
            method.step(oracles, oracles)

    oracles = quadratic.oracles()
    first = new()
    run(first, 7)
    x, saved = [v.copy() for v in first.x], [copy.deepcopy(worker.state_dict()) for worker in first.workers]
    run(first, 20)

    second = new()
    second.x = x
    for worker, state in zip(second.workers, saved, strict=True):
        worker.load_state_dict(state, np.copy)
    run(second, 20)
    assert np.array_equal(first.x[0], second.x[0])
    for a, b in zip(first.workers, second.workers, strict=True):
        assert a.step == b.step == 27
        for kind in a.points:
            assert np.array_equal(a.points[kind][0], b.points[kind][0])
        for layer, residual in a.channels["fed"].residual.items():
            assert np.array_equal(residual, b.channels["fed"].residual[layer])


def test_state_of_another_rank_is_refused(methods, quadratic):
    method = methods["ECLK"]([np.zeros((16, 12))], TOP, size=2, smoothness=1.0)
    method.step(quadratic.oracles(), quadratic.oracles())
    with pytest.raises(ValueError, match=r"saved by rank 0, this is rank 1: save and load one file per rank"):
        method.workers[1].load_state_dict(method.workers[0].state_dict(), np.copy)


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("ECLK", {"compression": TOP, "smoothness": 0.01, "theta1": 0.1}, "raise smoothness or smoothness_factor"),
        ("ECLSVRG", {"compression": TOP, "lr": 30.0}, "lower lr"),
    ],
)
def test_divergence_warns_once_and_names_the_remedy(methods, quadratic, name, arguments, remedy):
    method = methods[name]([np.zeros((16, 12))], size=1, **arguments)
    oracles = quadratic.oracles()[:1]
    with warnings.catch_warnings(record=True) as seen, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        for _ in range(100):
            method.step(oracles, oracles)
    messages = [str(w.message) for w in seen if "diverges" in str(w.message)]
    assert len(messages) == 1
    assert remedy in messages[0]
    assert method.method.name in messages[0]


def test_convergence_does_not_warn(methods, quadratic):
    method = methods["ECLK"]([np.full((16, 12), 1e-9)], TOP, size=2, smoothness=1.0, strong_convexity=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            method.step(quadratic.oracles(), quadratic.oracles())


def test_accordion_changes_each_layers_level_separately(methods):
    """A layer with a shrinking gradient is critical, one with a steady gradient is not. All ranks agree."""
    fading, steady = np.ones((8, 8)), np.full((8, 8), 1e-9)
    centres = np.random.default_rng(0).normal(size=(2, 2, 8, 8))
    oracles = [lambda x, c=c: [fading * (x[0] - c[0]), steady * (x[1] - c[1])] for c in centres]
    policy = Accordion(TopK(0.5, algorithm="allgather"), TOP, eta=0.5, interval=10, unit="steps")
    method = methods["ECLSVRG"]([np.zeros((8, 8)), np.zeros((8, 8))], policy, size=2, lr=0.3, p=0.3)
    seen = []
    for _ in range(60):
        method.step(oracles, oracles)
        specs = [worker.controller.specs() for worker in method.workers]
        assert specs[0] == specs[1]
        seen.append({name: spec.ratio for name, spec in specs[0].items()})
    assert seen[5] == {"0": 0.5, "1": 0.5}  # critical until two windows can be compared
    assert seen[25]["1"] == 0.1
    assert seen[25]["0"] == 0.5
    assert np.array_equal(method.workers[0].points["w"][0], method.workers[1].points["w"][0])


def test_gradients_are_computed_only_where_needed(methods, quadratic):
    """`full` is called at w if w has moved, `sampled` at x and w. If both are the same function, it is not called at w."""
    method = methods["ECLK"]([np.ones((16, 12))], TOP, size=1, smoothness=1.0, p=0.2)
    calls = []

    def recorded(kind):
        def oracle(x):
            calls.append((kind, x[0].copy()))
            return quadratic.oracles()[0](x)

        return oracle

    sampled, full = recorded("sampled"), recorded("full")
    moved = True
    for _ in range(30):
        calls.clear()
        x, w = method.x[0].copy(), method.workers[0].points.get("w", [np.ones((16, 12))])[0].copy()
        method.step([sampled], [full])
        expected = [("full", w)] * moved + [("sampled", x), ("sampled", w)]
        assert [kind for kind, _ in calls] == [kind for kind, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(calls, expected, strict=True))
        moved = method.method.coin(method.workers[0].step - 1)
    calls.clear()
    for _ in range(10):
        method.step([full], [full])
    assert 10 <= len(calls) < 20


@pytest.mark.parametrize(
    ("name", "arguments", "first", "later"),
    [
        ("ECLK", {"smoothness": 1.0, "p": 0.2}, {"fed", "dense"}, {"fed"}),
        ("ECLK", {"smoothness": 1.0, "shift": "learnt"}, {"fed", "dense"}, {"fed", "learnt"}),
        ("ECSGD", {"lr": 0.1}, {"fed"}, {"fed"}),
        ("EF21", {"lr": 0.1}, {"dense"}, {"learnt"}),
    ],
)
def test_a_round_sends_one_message_and_a_dense_one_if_w_has_moved(methods, quadratic, name, arguments, first, later):
    method = methods[name]([np.ones((16, 12))], TOP, size=2, **arguments)
    oracles, sent, worker = quadratic.oracles(), [], method.workers[0]
    messages = worker.messages
    worker.messages = lambda *gradients: sent.append(messages(*gradients)) or sent[-1]
    moved = []
    for _ in range(40):
        moved.append(worker.moved)
        method.step(oracles, oracles)
    kinds = [sorted(message.split(".")[0] for message in round_) for round_ in sent]
    dense = name == "ECLK" and "shift" not in arguments
    assert kinds[0] == sorted(first)
    assert kinds[1:] == [sorted(later | ({"dense"} if dense and m else set())) for m in moved[1:]]
    assert not dense or 1 < sum(moved) < 20

"""Warm-up: dense first, or levels that tighten, by the step alone."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import QSGD, Dense, PowerSGD, RandomK, TopK, Warmup
from hvd_accordion.policy.assignment import adaptive, assign, level, reachable_specs
from hvd_accordion.policy.layers import Layer
from hvd_accordion.training.controller import Controller

LARGE = Layer("w", (256, 256), "float32")


def chosen(warmup: Warmup, steps: int) -> list:
    return [warmup.choose("w", step, 0) for step in range(steps)]


def test_dense_first():
    assert chosen(Warmup(TopK(0.1), steps=3), 5) == [Dense()] * 3 + [TopK(0.1)] * 2
    assert chosen(Warmup(QSGD(7), steps=1), 2) == [Dense(), QSGD(7)]


def test_ratios_fall_as_in_dgc():
    warmup = Warmup(TopK(0.001), steps=8, levels=4)
    ratios = [spec.ratio for spec in chosen(warmup, 9)]
    assert ratios == pytest.approx([0.25, 0.25, 0.0629, 0.0629, 0.0158, 0.0158, 0.00398, 0.00398, 0.001], rel=2e-3)
    exact = [spec.ratio for spec in Warmup(TopK(0.25 / 4**4), steps=4, levels=4).specs("w")]
    assert exact == pytest.approx([0.25 / 4**i for i in range(5)])  # 25 %, 6.25 %, 1.5625 %, 0.39 %, 0.098 %
    assert chosen(Warmup(RandomK(0.01), steps=2, levels=1, start=0.5), 3)[0] == RandomK(0.5)


def test_a_level_keeps_all_else_of_the_spec():
    spec = TopK(0.01, values="float16", error_feedback=False)
    (first, last) = Warmup(spec, steps=4, levels=1).specs("w")
    assert last is spec and (first.ratio, first.values, first.error_feedback) == (0.25, "float16", False)


def test_ranks_fall_by_halves():
    assert chosen(Warmup(PowerSGD(1), steps=3, levels=3), 5) == [PowerSGD(r) for r in (8, 4, 2, 1, 1)]
    assert chosen(Warmup(PowerSGD(3), steps=5, levels=2), 6) == [PowerSGD(r) for r in (12, 12, 12, 6, 6, 3)]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.floats(1e-4, 0.2))
def test_levels_tighten_and_changes_are_announced(steps, levels, ratio):
    levels = min(steps, levels)
    warmup = Warmup(TopK(ratio), steps, levels)
    specs = chosen(warmup, steps + 3)
    assert [specs.index(spec) for spec in warmup.specs("w")] == [
        math.ceil(i * steps / levels) for i in range(levels + 1)
    ]
    assert all(a.ratio >= b.ratio for a, b in itertools.pairwise(specs))
    for step in range(steps + 2):
        change = warmup.next_change(step)
        if specs[step + 1] != specs[step]:
            assert change == step + 1
        assert change is None or change > step
    assert warmup.next_change(steps) is None


def test_a_layer_travels_dense_under_a_level_that_does_not_shrink_it():
    policy, tall = Warmup(PowerSGD(2), steps=4, levels=4), Layer("w", (40, 40), "float32")
    assert [level(tall, policy, step, 2) for step in range(5)] == [
        Dense(),
        Dense(),
        PowerSGD(8),
        PowerSGD(4),
        PowerSGD(2),
    ]
    assert reachable_specs(tall, policy, 2) == [Dense(), PowerSGD(8), PowerSGD(4), PowerSGD(2)]
    assert adaptive(tall, policy, 2) and not adaptive(Layer("b", (40,), "float32"), policy, 2)


def test_the_controller_follows_even_where_several_steps_make_an_update():
    control = Controller([LARGE], assign(Warmup(TopK(0.01), steps=6, levels=2), ["w"]), 2)
    seen, versions = [], []
    for steps in (1, 1, 3, 1, 1):
        seen.append(control.specs()["w"].ratio)
        versions.append(control.version)
        assert not control.after_update(0, 0, steps)
    assert seen == pytest.approx([0.25, 0.25, 0.25, 0.05, 0.01])
    assert [a != b for a, b in itertools.pairwise(versions)] == [False, False, True, True]
    assert [row.regime for row in control.report({"w": 1.0})] == [None]
    resumed = Controller([LARGE], assign(Warmup(TopK(0.01), steps=6, levels=2), ["w"]), 2)
    assert resumed.load_state_dict(control.state_dict()) == [] and resumed.specs()["w"] == TopK(0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": Dense()}, TypeError, r"spec must be a lossy compression spec such as TopK\(0.001\), got Dense"),
        ({"spec": "topk"}, TypeError, "spec must be a lossy compression spec"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"levels": -1}, ValueError, "levels must be"),
        ({"levels": 11}, ValueError, "levels must be at most steps=10, got 11"),
        ({"spec": QSGD(7), "levels": 1}, ValueError, "levels must be 0 for a spec with neither ratio nor rank, got 1"),
        ({"levels": 1, "start": 0.01}, ValueError, "start must be more than the ratio"),
        ({"start": 1.5}, ValueError, "start must be"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Warmup(**{"spec": TopK(0.01), "steps": 10} | arguments)

"""What an Auto chooses, and what it tells."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import QSGD, Accordion, Auto, Dense, PowerSGD, TopK
from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.policy import assignment
from hvd_accordion.policy.auto import Calibration, advice_of, advise, choose, cost, predicted
from hvd_accordion.policy.cost_model import Link, layer_seconds, round_seconds
from hvd_accordion.policy.layers import Layer

LARGE, SMALL, BIAS = (
    Layer("large", (512, 512), "float32"),
    Layer("small", (64, 64), "float32"),
    Layer("bias", (64,), "float32"),
)
LAYERS = [LARGE, SMALL, BIAS]
MBIT = 1e6 / 8
DEFAULT = Auto()


def choices(auto: Auto, layers=LAYERS, world_size: int = 2) -> dict:
    found = {x.name: assignment.auto_specs(x, auto, world_size) for x in layers}
    return {name: specs for name, specs in found.items() if specs}


def measured(
    bandwidth: float, seconds: float = 1e-3, backward: float = 0.0, auto: Auto = DEFAULT, **link
) -> Calibration:
    """The large layer's gradient is the first of a backward pass, the others' are the last."""
    times = {(x.name, spec): seconds for x in LAYERS for spec in choices(auto).get(x.name, ())}
    ready = {"large": 0.0, "small": backward, "bias": backward}
    return Calibration(Link(0.0, bandwidth, **link), 2, ready, times)


def test_small_and_one_dimensional_layers_have_no_choice():
    assert choices(Auto()) == {"large": (PowerSGD(4),), "small": (PowerSGD(4),)}
    assert choices(Auto((PowerSGD(32), TopK(0.01))))["small"] == (TopK(0.01),)


def test_a_slow_link_is_worth_compressing_for_and_a_fast_one_is_not():
    slow, fast = (choose(LAYERS, choices(Auto()), measured(b * MBIT)) for b in (10, 1e6))
    assert slow == {"large": PowerSGD(4), "small": PowerSGD(4), "bias": Dense()}
    assert set(fast.values()) == {Dense()}


def test_only_layers_that_save_more_than_they_take_are_compressed():
    # on the link the large one saves 8 (512 512 - 4 1024) / 1e9 s = 8.3 ms at 1 Gbit/s, the small one 0.1 ms
    chosen = choose(LAYERS, choices(Auto()), measured(1000 * MBIT, seconds=1e-3))
    assert chosen == {"large": PowerSGD(4), "small": Dense(), "bias": Dense()}


def test_what_backward_hides_needs_no_compression():
    assert choose(LAYERS, choices(Auto()), measured(1000 * MBIT, backward=0.0))["large"] == PowerSGD(4)
    assert choose(LAYERS, choices(Auto()), measured(1000 * MBIT, backward=0.1))["large"] == Dense()
    late = replace(measured(1000 * MBIT), ready={"small": 0.0, "bias": 0.0, "large": 0.1})
    assert choose(LAYERS, choices(Auto()), late)["large"] == PowerSGD(4)  # nothing is left to hide behind


def test_the_prediction_by_hand():
    m = measured(1e6, seconds=0.25, overhead=0.125)
    c = cost(LARGE, PowerSGD(4), m)
    assert (c.wire, c.compression, c.latency) == (4 * 4 * 1024 / 1e6, 0.25, 0.25)  # two rounds
    d = cost(SMALL, Dense(), m)
    assert (d.wire, d.compression, d.latency) == (4 * 4096 / 1e6, 0.0, 0.125)
    assert predicted([(0.0, c), (0.0, d)]) == pytest.approx(0.25 + c.wire + d.wire + 0.25)
    assert predicted([(0.0, d), (0.0, c)]) == pytest.approx(0.25 + c.wire + 0.25)  # d is sent while c is compressed
    assert predicted([(0.0, c), (10.0, d)]) == pytest.approx(0.25 + d.wire + 0.25)
    assert predicted([(0.0, d), (10.0, c)]) == pytest.approx(0.25 + c.wire + 0.25)
    assert predicted([(0.0, d), (0.01, d)]) == pytest.approx(2 * d.wire - 0.01 + 0.125)  # the link is still busy
    assert predicted([]) == 0.0


def test_the_wire_seconds_of_a_layer_are_the_cost_models():
    m = measured(1e6, overhead=0.125)
    for spec in (Dense(), PowerSGD(4), TopK(0.01), QSGD(7)):
        c = cost(LARGE, spec, m)
        assert c.wire == layer_seconds(LARGE.shape, "float32", spec, 2, m.link)
        assert c.latency == round_seconds(spec, 2, m.link)


def total(layers, choice, m: Calibration) -> float:
    order = sorted(reversed(layers), key=m.ready_at)
    return predicted((m.ready_at(x), cost(x, choice[x.name], m)) for x in order)


def everywhere(layers, spec) -> dict:
    return {x.name: spec for x in layers}


@settings(deadline=None)
@given(
    st.floats(1e5, 1e11),
    st.floats(0, 1),
    st.floats(0, 0.01),
    st.integers(1, 2),
    st.lists(st.floats(1e-6, 0.1), min_size=6, max_size=6),
)
def test_the_choice_is_among_the_best_of_all(bandwidth, backward, overhead, count, seconds):
    layers = [Layer(f"l{i}", (128 * (i + 1), 256), "float32") for i in range(3)]
    specs = (PowerSGD(4), TopK(0.01))[:count]
    times = {(x.name, spec): seconds.pop() for x in layers for spec in specs}
    ready = {x.name: backward * (2 - i) / 2 for i, x in enumerate(layers)}
    m = Calibration(Link(0.0, bandwidth, overhead), 2, ready, times)
    chosen = choose(layers, everywhere(layers, specs), m)
    assert list(chosen) == [x.name for x in layers]
    mine = total(layers, chosen, m)
    choices = [dict(zip(chosen, c, strict=True)) for c in itertools.product((Dense(), *specs), repeat=3)]
    assert all(mine <= total(layers, everywhere(layers, spec), m) + 1e-12 for spec in (Dense(), *specs))
    assert all(  # no change of one layer makes it better
        mine <= total(layers, c, m) + 1e-12 for c in choices if sum(c[n] != chosen[n] for n in c) == 1
    )
    assert mine - min(total(layers, c, m) for c in choices) <= max(times.values()) + 1e-12


def test_layers_with_autos_of_their_own_are_all_chosen_for():
    allowed = {"large": (PowerSGD(4),), "small": (TopK(0.01),)}
    times = {("large", PowerSGD(4)): 1e-3, ("small", TopK(0.01)): 1e-3}
    chosen = choose(LAYERS, allowed, Calibration(Link(0.0, 10 * MBIT), 2, {}, times))
    assert chosen == {"large": PowerSGD(4), "small": TopK(0.01), "bias": Dense()}


def test_each_layer_gets_the_candidate_that_is_best_for_it():
    allowed = {"large": (PowerSGD(4), TopK(0.01)), "small": (PowerSGD(4), TopK(0.01))}
    for quick, slow in ((PowerSGD(4), TopK(0.01)), (TopK(0.01), PowerSGD(4))):
        times = {("large", quick): 1e-3, ("large", slow): 1.0, ("small", quick): 1.0, ("small", slow): 1e-4}
        chosen = choose(LAYERS, allowed, Calibration(Link(0.0, 10 * MBIT), 2, {}, times))
        assert chosen == {"large": quick, "small": slow, "bias": Dense()}


def test_five_layers_and_two_candidates_come_close_to_the_best():
    """Of all 243 choices, over links and machines of all speeds."""
    layers = [Layer(f"l{i}", (128 * (i % 3 + 1), 256), "float32") for i in range(5)]
    specs, missed = (PowerSGD(4), TopK(0.01)), 0
    for seed in range(60):
        rng = random.Random(seed)
        times = {(x.name, spec): 10 ** rng.uniform(-6, -1) for x in layers for spec in specs}
        backward = 10 ** rng.uniform(-4, 0)
        ready = {x.name: backward * (4 - i) / 4 for i, x in enumerate(layers)}
        m = Calibration(Link(0.0, 10 ** rng.uniform(5, 11)), 2, ready, times)
        costs = [[cost(x, spec, m) for spec in (Dense(), *specs)] for x in layers[::-1]]
        when = [ready[x.name] for x in layers[::-1]]
        best = min(predicted(zip(when, choice, strict=True)) for choice in itertools.product(*costs))
        mine = total(layers, choose(layers, everywhere(layers, specs), m), m)
        missed += mine > best + 1e-12
        assert mine <= 2.5 * best
    assert missed <= 6


def test_advice_tells_what_each_choice_would_cost():
    auto = Auto((PowerSGD(4), TopK(0.01)))
    m = measured(100 * MBIT, auto=auto)
    advice = advise(LAYERS, choices(auto), m)
    assert [row.name for row in advice] == ["large", "small", "bias"] and len(advice) == 3
    assert list(advice.step) == ["Dense()", "PowerSGD(rank=4)", "TopK(ratio=0.01)", "chosen"]
    assert advice.step["chosen"] == min(advice.step.values())
    assert math.isclose(advice.step["Dense()"], total(LAYERS, everywhere(LAYERS, Dense()), m))
    assert math.isclose(advice.step["chosen"], total(LAYERS, {row.name: row.chosen for row in advice}, m))
    assert [row.ready for row in advice] == [m.ready[x.name] for x in LAYERS]
    assert advice.compresses and "pays" in str(advice)
    text = str(advise(LAYERS, choices(Auto()), measured(1e12)))
    assert "This link needs no compression" in text and "512x512" in text


def test_advice_without_an_auto_is_an_error():
    with pytest.raises(ValueError, match=r"advice needs compression=Auto\(\)"):
        advice_of(object())


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ((), ValueError, "candidates must hold at least one"),
        (("PowerSGD",), TypeError, "candidates must be compression specs"),
        ((Accordion(),), TypeError, "candidates must be compression specs"),
    ],
)
def test_wrong_candidates(candidates, error, message):
    with pytest.raises(error, match=message):
        Auto(candidates)


def test_one_candidate_needs_no_tuple_and_equal_autos_are_equal():
    assert Auto(PowerSGD(2)) == Auto((PowerSGD(2),)) == Auto([PowerSGD(2)])
    assert hash(Auto()) == hash(Auto(PowerSGD(4)))
    assert str(Auto((PowerSGD(2), TopK(0.1)))) == "Auto(PowerSGD(rank=2), TopK(ratio=0.1))"


def test_an_auto_may_be_the_relaxed_side_only():
    assert Accordion(critical=Dense(), relaxed=Auto()).relaxed == Auto()
    with pytest.raises(TypeError, match="critical must be a compression spec"):
        Accordion(critical=Auto())


def test_costs_are_those_of_one_rank():
    m = measured(1e6)
    assert cost(LARGE, Dense(), m).wire == pytest.approx(LARGE.nbytes / 1e6)  # 2 (n - 1) / n = 1 of two ranks
    assert cost(LARGE, Dense(), m).latency == 0.0
    assert [kind for kind, _ in Dense().messages(LARGE.shape, "float32", 2)] == [AllReduce]

"""What an Auto chooses, and what it tells."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import Accordion, Auto, Dense, PowerSGD, TopK, plan
from hvd_accordion.auto import Measured, advice_of, advise, choose, cost, predicted
from hvd_accordion.collectives import AllReduce
from hvd_accordion.cost import Link
from hvd_accordion.plan import Layer

LARGE, SMALL, BIAS = Layer("large", (512, 512), "float32"), Layer("small", (64, 64), "float32"), Layer("bias", (64,), "float32")
LAYERS = [LARGE, SMALL, BIAS]
MBIT = 1e6 / 8


def choices(auto: Auto, layers=LAYERS, world_size: int = 2) -> dict:
    found = {x.name: plan.choices(x, auto, world_size) for x in layers}
    return {name: specs for name, specs in found.items() if specs}


def measured(bandwidth: float, seconds: float = 1e-3, backward: float = 0.0, auto: Auto = Auto(), **link) -> Measured:
    times = {(x.name, spec): seconds for x in LAYERS for spec in choices(auto).get(x.name, ())}
    return Measured(Link(0.0, bandwidth, **link), 2, backward, times)


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


def test_the_prediction_by_hand():
    m = measured(1e6, seconds=0.25, backward=0.5, overhead=0.125)
    c = cost(LARGE, PowerSGD(4), m)
    assert (c.wire, c.compression, c.latency) == (4 * 4 * 1024 / 1e6, 0.25, 0.25)  # two rounds
    d = cost(SMALL, Dense(), m)
    assert (d.wire, d.compression, d.latency) == (4 * 4096 / 1e6, 0.0, 0.125)
    assert predicted([c, d], 0.0) == pytest.approx(0.25 + c.wire + d.wire + 0.25)
    assert predicted([c, d], 10.0) == pytest.approx(0.25 + 0.25)
    assert predicted([], 1.0) == 0.0


@settings(deadline=None)
@given(
    st.floats(1e5, 1e11),
    st.floats(0, 1),
    st.floats(0, 0.01),
    st.lists(st.floats(1e-6, 0.1), min_size=3, max_size=3),
)
def test_one_candidate_is_chosen_for_as_few_layers_as_pay_best(bandwidth, backward, overhead, seconds):
    layers = [Layer(f"l{i}", (128 * (i + 1), 256), "float32") for i in range(3)]
    allowed = {x.name: (PowerSGD(4),) for x in layers}
    times = {(x.name, PowerSGD(4)): s for x, s in zip(layers, seconds, strict=True)}
    m = Measured(Link(0.0, bandwidth, overhead), 2, backward, times)

    def total(choice):
        return predicted([cost(x, spec, m) for x, spec in zip(layers, choice, strict=True)], backward)

    mine = total(choose(layers, allowed, m).values())
    assert mine <= total([Dense()] * 3) and mine <= total([PowerSGD(4)] * 3)
    # greedy: at worst it compresses one layer's worth too much
    best = min(total(choice) for choice in itertools.product((Dense(), PowerSGD(4)), repeat=3))
    assert mine - best <= max(seconds) + 1e-12


def test_layers_with_autos_of_their_own_are_all_chosen_for():
    allowed = {"large": (PowerSGD(4),), "small": (TopK(0.01),)}
    times = {("large", PowerSGD(4)): 1e-3, ("small", TopK(0.01)): 1e-3}
    chosen = choose(LAYERS, allowed, Measured(Link(0.0, 10 * MBIT), 2, 0.0, times))
    assert chosen == {"large": PowerSGD(4), "small": TopK(0.01), "bias": Dense()}


def test_each_layer_gets_the_candidate_that_is_best_for_it():
    allowed = {"large": (PowerSGD(4), TopK(0.01)), "small": (PowerSGD(4), TopK(0.01))}
    for quick, slow in ((PowerSGD(4), TopK(0.01)), (TopK(0.01), PowerSGD(4))):
        times = {("large", quick): 1e-3, ("large", slow): 1.0, ("small", quick): 1.0, ("small", slow): 1e-4}
        chosen = choose(LAYERS, allowed, Measured(Link(0.0, 10 * MBIT), 2, 0.0, times))
        assert chosen == {"large": quick, "small": slow, "bias": Dense()}


@settings(deadline=None)
@given(st.floats(1e5, 1e11), st.floats(0, 1), st.lists(st.floats(1e-6, 0.1), min_size=6, max_size=6))
def test_of_several_candidates_no_one_alone_is_better(bandwidth, backward, seconds):
    layers = [Layer(f"l{i}", (128 * (i + 1), 256), "float32") for i in range(3)]
    specs = (PowerSGD(4), TopK(0.01))
    times = dict(zip(itertools.product((x.name for x in layers), specs), seconds, strict=True))
    m = Measured(Link(0.0, bandwidth), 2, backward, times)

    def total(choice):
        return predicted([cost(x, spec, m) for x, spec in zip(layers, choice, strict=True)], backward)

    mine = total(choose(layers, dict.fromkeys((x.name for x in layers), specs), m).values())
    alone = [choose(layers, dict.fromkeys((x.name for x in layers), (spec,)), m).values() for spec in specs]
    assert mine <= min(total(choice) for choice in [*alone, [Dense()] * 3, *([spec] * 3 for spec in specs)])


def test_advice_tells_what_each_choice_would_cost():
    auto = Auto((PowerSGD(4), TopK(0.01)))
    m = measured(100 * MBIT, auto=auto)
    advice = advise(LAYERS, choices(auto), m)
    assert [row.name for row in advice] == ["large", "small", "bias"] and len(advice) == 3
    assert list(advice.step) == ["Dense()", "PowerSGD(rank=4)", "TopK(ratio=0.01)", "chosen"]
    assert advice.step["chosen"] == min(advice.step.values())
    everything = predicted([cost(x, Dense(), m) for x in LAYERS], 0.0)
    assert math.isclose(advice.step["Dense()"], everything)
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

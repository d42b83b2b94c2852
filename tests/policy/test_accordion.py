"""The rule of Accordion: which layer is critical, from norms and learning rates."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import Accordion, Auto, Dense, PowerSGD, Regime, TopK
from hvd_accordion.policy.accordion import change

CRITICAL, RELAXED = Regime.CRITICAL, Regime.RELAXED
positive = st.floats(1e-6, 1e6)


def after(first: float, second: float, **settings) -> Regime:
    """The regime of a layer after its first comparison."""
    accordion = Accordion(**settings)
    accordion.observe({"w": first}, 0.1)
    return accordion.observe({"w": second}, 0.1)["w"]


def test_defaults_are_power_sgd_4_over_1_with_the_papers_numbers():
    accordion = Accordion()
    same = Accordion(PowerSGD(4), PowerSGD(1), eta=0.5, interval=10, unit="epochs", lr_drop=0.5, norm="sampled")
    assert accordion == same
    assert accordion.spec("any") == PowerSGD(4)


@pytest.mark.parametrize(
    ("first", "second", "regime"),
    [
        (1.0, 0.75, RELAXED),
        (1.0, 0.5, CRITICAL),  # the threshold itself
        (1.0, 0.25, CRITICAL),
        (1.0, 1.25, RELAXED),
        (1.0, 1.5, CRITICAL),  # growth counts too
        (1.0, 4.0, CRITICAL),
        (1.0, 1.0, RELAXED),
        (1.0, 0.0, CRITICAL),
        (0.0, 0.0, CRITICAL),  # a zero previous norm
        (0.0, 1.0, CRITICAL),
    ],
)
def test_ratio_of_at_least_eta_is_critical_both_ways(first, second, regime):
    assert after(first, second, eta=0.5) is regime


@settings(deadline=None)
@given(positive, positive, st.floats(0.01, 10))
def test_the_rule_is_relative_change_against_eta(first, second, eta):
    expected = CRITICAL if abs(first - second) / first >= eta else RELAXED
    assert after(first, second, eta=eta) is expected


def test_change_is_infinite_where_it_has_no_meaning():
    assert change(2.0, 3.0) == 0.5
    for previous, now in [
        (0, 1),
        (0, 0),
        (math.nan, 1),
        (1, math.nan),
        (math.inf, 1),
        (1, math.inf),
        (math.inf, math.inf),
    ]:
        assert change(previous, now) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_critical_and_logged(bad, caplog):
    accordion = Accordion(eta=1e9)
    accordion.observe({"good": 1.0, "w": 1.0}, 0.1)
    with caplog.at_level(logging.WARNING, "hvd_accordion"):
        regimes = accordion.observe({"good": 1.0, "w": bad}, 0.1)
    assert regimes == {"good": RELAXED, "w": CRITICAL}
    (record,) = caplog.records
    assert " w " in record.getMessage() and str(bad) in record.getMessage()
    assert accordion.observe({"good": 1.0, "w": 1.0}, 0.1)["w"] is CRITICAL  # compared with what was no number
    assert accordion.observe({"good": 1.0, "w": 1.0}, 0.1)["w"] is RELAXED


def test_everything_is_critical_up_to_the_first_comparison():
    accordion = Accordion(TopK(0.5), TopK(0.01))
    assert accordion.regime("w") is CRITICAL and accordion.spec("w") == TopK(0.5)
    assert accordion.observe({"w": 1.0}, 0.1)["w"] is CRITICAL  # nothing to compare with
    assert accordion.spec("w") == TopK(0.5)
    assert accordion.observe({"w": 1.0}, 0.1)["w"] is RELAXED
    assert accordion.spec("w") == TopK(0.01)


def test_a_layer_that_comes_later_starts_critical():
    accordion = Accordion()
    accordion.observe({"old": 1.0}, 0.1)
    assert accordion.observe({"old": 1.0, "new": 1.0}, 0.1) == {"old": RELAXED, "new": CRITICAL}
    assert accordion.observe({"old": 1.0, "new": 1.0}, 0.1) == {"old": RELAXED, "new": RELAXED}


def test_layers_are_judged_one_by_one():
    accordion = Accordion()
    accordion.observe({"a": 1.0, "b": 1.0}, 0.1)
    assert accordion.observe({"a": 1.0, "b": 9.0}, 0.1) == {"a": RELAXED, "b": CRITICAL}
    assert accordion.ratios == {"a": 0.0, "b": 8.0}


def test_two_kinds_of_spec_may_be_mixed():
    accordion = Accordion(critical=Dense(), relaxed=TopK(0.01))
    accordion.observe({"w": 1.0}, 0.1)
    accordion.observe({"w": 1.0}, 0.1)
    assert accordion.spec("w") == TopK(0.01)


# the learning rate


def relaxed(**settings) -> Accordion:
    accordion = Accordion(**settings)
    for _ in range(2):
        accordion.observe({"a": 1.0, "b": 1.0}, 0.1)
    assert set(accordion.regimes.values()) == {RELAXED}
    return accordion


@pytest.mark.parametrize(
    ("lr", "dropped"), [(0.1, False), (0.2, False), (0.051, False), (0.05, True), (0.01, True), (0.0, True)]
)
def test_half_the_rate_of_the_last_check_makes_all_layers_critical(lr, dropped):
    accordion = relaxed()
    assert accordion.observe_lr(lr) is dropped
    assert set(accordion.regimes.values()) == {CRITICAL if dropped else RELAXED}


def test_lr_drop_is_the_factor():
    assert not relaxed(lr_drop=0.1).observe_lr(0.02)
    assert relaxed(lr_drop=0.1).observe_lr(0.01)


def test_critical_after_a_drop_until_the_next_check():
    accordion = relaxed()
    assert accordion.observe_lr(0.01)
    assert not accordion.observe_lr(0.01)  # told once
    assert accordion.regime("a") is CRITICAL
    assert accordion.observe({"a": 1.0, "b": 9.0}, 0.01) == {"a": RELAXED, "b": CRITICAL}


def test_a_drop_that_the_check_itself_sees_is_critical_for_one_interval():
    accordion = relaxed()
    assert set(accordion.observe({"a": 1.0, "b": 1.0}, 0.01).values()) == {CRITICAL}
    assert set(accordion.observe({"a": 1.0, "b": 1.0}, 0.01).values()) == {RELAXED}


def test_slow_decay_counts_from_the_last_check_not_from_the_start():
    accordion = relaxed()
    for lr in (0.08, 0.064, 0.0512, 0.041):  # together more than half, but not between two checks
        assert not accordion.observe_lr(lr)
        assert set(accordion.observe({"a": 1.0, "b": 1.0}, lr).values()) == {RELAXED}


def test_a_warm_up_and_a_constant_rate_are_no_drop():
    accordion = Accordion()
    assert not any(accordion.observe_lr(lr) for lr in (0.0, 0.02, 0.06, 0.1, 0.1))


def test_a_cosine_schedule_does_not_stay_critical():
    epochs, accordion, seen = 200, Accordion(interval=10), []
    for epoch in range(epochs):
        lr = 0.05 * (1 + math.cos(math.pi * epoch / epochs))
        accordion.observe_lr(lr)
        seen.append(accordion.regime("w"))
        if accordion.window.is_open(epoch):
            accordion.observe({"w": 1.0}, lr)
    assert set(seen[:11]) == {CRITICAL}
    assert set(seen[11:160]) == {RELAXED}  # towards its end a cosine does halve within ten epochs


# epochs and steps


def test_epochs_are_measured_at_the_first_and_then_every_interval():
    assert [e for e in range(12) if Accordion(interval=5).window.is_open(e)] == [0, 5, 10]
    assert all(Accordion(interval=1).window.is_open(e) for e in range(5))


def test_steps_are_always_measured():
    assert all(Accordion(interval=5, unit="steps").window.is_open(e) for e in range(12))


# state


def test_state_goes_through_json_and_goes_on_alike():
    accordion = relaxed(interval=3)
    accordion.observe({"a": 0.0, "b": 1.0}, 0.1)
    accordion.observe({"a": 1.0, "b": math.nan}, 0.1)
    loaded = Accordion(interval=3)
    loaded.load_state_dict(json.loads(json.dumps(accordion.state_dict())))
    assert repr(loaded.state_dict()) == repr(accordion.state_dict())  # as text: NaN equals NaN
    assert all(isinstance(regime, Regime) for regime in loaded.regimes.values())
    assert loaded.observe_lr(0.01) and accordion.observe_lr(0.01)
    assert loaded.observe({"a": 1.2, "b": 1.0}, 0.01) == accordion.observe({"a": 1.2, "b": 1.0}, 0.01)


def test_the_state_of_a_fresh_one_makes_a_fresh_one():
    accordion = relaxed()
    accordion.load_state_dict(json.loads(json.dumps(Accordion().state_dict())))
    assert accordion.lr is None and accordion.regime("a") is CRITICAL
    assert accordion.observe({"a": 1.0}, 0.1)["a"] is CRITICAL


def test_the_state_is_a_copy():
    accordion = relaxed()
    state = accordion.state_dict()
    before = copy.deepcopy(state)
    accordion.observe({"a": 7.0, "b": 7.0}, 0.3)
    assert state == before


def test_what_observe_returns_is_a_copy():
    accordion = relaxed()
    accordion.observe({"a": 1.0, "b": 1.0}, 0.1)["a"] = CRITICAL
    assert accordion.regime("a") is RELAXED


# bad arguments


@pytest.mark.parametrize(
    ("argument", "value", "error", "allowed"),
    [
        ("critical", 4, TypeError, "compression spec"),
        ("critical", None, TypeError, "compression spec"),
        ("critical", PowerSGD, TypeError, "compression spec"),
        ("relaxed", "powersgd", TypeError, "compression spec"),
        ("relaxed", Accordion(), TypeError, "compression spec"),
        ("eta", 0, ValueError, "(0, inf)"),
        ("eta", -0.5, ValueError, "(0, inf)"),
        ("eta", math.nan, ValueError, "(0, inf)"),
        ("eta", math.inf, ValueError, "(0, inf)"),
        ("eta", "0.5", TypeError, "(0, inf)"),
        ("eta", True, TypeError, "(0, inf)"),
        ("interval", 0, ValueError, "an integer >= 1"),
        ("interval", -3, ValueError, "an integer >= 1"),
        ("interval", 2.5, TypeError, "an integer >= 1"),
        ("interval", True, TypeError, "an integer >= 1"),
        ("unit", "batches", ValueError, "'epochs', 'steps'"),
        ("unit", None, ValueError, "'epochs', 'steps'"),
        ("lr_drop", 0, ValueError, "(0, 1)"),
        ("lr_drop", 1.0, ValueError, "(0, 1)"),
        ("lr_drop", 1.5, ValueError, "(0, 1)"),
        ("lr_drop", None, TypeError, "(0, 1)"),
        ("norm", "l2", ValueError, "'sampled', 'exact'"),
        ("norm", None, ValueError, "'sampled', 'exact'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(argument, value, error, allowed):
    with pytest.raises(error) as raised:
        Accordion(**{argument: value})
    message = str(raised.value)
    assert message.startswith(argument) and repr(value) in message and allowed in message


def test_another_norm_makes_another_accordion_and_another_text():
    assert Accordion(norm="exact") != Accordion()
    assert "norm='exact'" in repr(Accordion(norm="exact")) and "norm='sampled'" in repr(Accordion())
    assert str(Accordion(norm="exact")).endswith("every 10 epochs, exact norm)")
    assert str(Accordion()).endswith("every 10 epochs)")


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    accordion = Accordion(eta=numpy.float32(0.25), interval=numpy.int64(3))
    assert (accordion.eta, accordion.interval) == (0.25, 3)
    assert type(accordion.eta) is float and type(accordion.interval) is int


# more than two levels

LADDER = (PowerSGD(8), PowerSGD(4), PowerSGD(1))


def level_after(ratio: float, count: int, **settings) -> int:
    """The level of a layer whose norm has changed by this share; of `count` levels."""
    accordion = Accordion(levels=[TopK(0.5 / 2**i) for i in range(count)], **settings)
    for norm in (1.0, 1.0 + ratio):
        accordion.observe({"w": norm}, 0.1)
    return accordion.level("w")


@pytest.mark.parametrize(
    ("ratio", "level"), [(9.0, 0), (0.5, 0), (0.49, 1), (0.25, 1), (0.24, 2), (0.125, 2), (0.12, 3), (0.0, 3)]
)
def test_thresholds_are_halves_of_eta(ratio, level):
    assert level_after(ratio, 4, eta=0.5) == level


@settings(deadline=None)
@given(st.lists(positive, min_size=2, max_size=12), st.integers(2, 6), st.floats(0.05, 4))
def test_levels_follow_the_documented_rule(norms, count, eta):
    """The oracle counts the thresholds above the change; two levels are an Accordion of the first and the last."""
    levels = [TopK(0.5 / 2**i) for i in range(count)]
    many, two = Accordion(levels=levels, eta=eta), Accordion(levels[0], levels[-1], eta=eta)
    thresholds = [eta / 2**i for i in range(count - 1)]
    for before, now in zip([None, *norms], norms, strict=False):
        many.observe({"w": now}, 0.1)
        two.observe({"w": now}, 0.1)
        change = math.inf if before is None else abs(before - now) / before
        assert many.level("w") == sum(change < threshold for threshold in thresholds)
        assert many.spec("w") == many.choose("w", 0, 0) == levels[many.level("w")]
        if two.regime("w") is CRITICAL:
            assert many.regime("w") is CRITICAL
        assert levels.index(many.spec("w")) <= levels.index(two.spec("w"))  # never compressed more


@settings(deadline=None)
@given(st.floats(0, 3), st.floats(0, 3), st.integers(2, 6))
def test_a_larger_change_is_never_compressed_more(one, other, count):
    small, large = sorted((one, other))
    assert level_after(small, count) >= level_after(large, count)


def test_two_levels_are_critical_and_relaxed():
    for ratio in (0.0, 0.4, 0.5, 1.0):
        accordion = Accordion(levels=[PowerSGD(4), PowerSGD(1)])
        for norm in (1.0, 1.0 + ratio):
            accordion.observe({"w": norm}, 0.1)
        assert accordion.regime("w") is after(1.0, 1.0 + ratio)


def test_regimes_of_three_levels_have_names_and_all_are_critical_at_first_and_after_a_drop():
    accordion = Accordion(levels=LADDER)
    assert accordion.specs("w") == LADDER and accordion.choose("w", 0, 0) == PowerSGD(8)
    assert set(accordion.observe({"a": 1.0, "b": 1.0, "c": 1.0}, 0.1).values()) == {CRITICAL}
    assert accordion.observe({"a": 1.0, "b": 1.3, "c": 2.0}, 0.1) == {"a": RELAXED, "b": "level 1/2", "c": CRITICAL}
    assert [accordion.choose(name, 0, 0) for name in "abc"] == [PowerSGD(1), PowerSGD(4), PowerSGD(8)]
    assert accordion.observe_lr(0.01) and set(accordion.regimes.values()) == {CRITICAL}
    accordion.observe({"a": 1.0, "b": 1.3, "c": 2.0}, 0.01)
    assert set(accordion.observe({"a": 1.0, "b": 1.3, "c": 2.0}, 0.001).values()) == {CRITICAL}  # a drop at the check


def test_a_ladders_state_fits_another_number_of_levels():
    ladder = Accordion(levels=LADDER)
    for norms in ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.3, "c": 2.0}):
        ladder.observe(norms, 0.1)
    state = json.loads(json.dumps(ladder.state_dict()))
    same, two, five = Accordion(levels=LADDER), Accordion(), Accordion(levels=[TopK(0.5 / 2**i) for i in range(5)])
    for other in (same, two, five):
        other.load_state_dict(state)
    assert same.regimes == ladder.regimes
    assert two.regimes == {"a": RELAXED, "b": CRITICAL, "c": CRITICAL}  # the next that compresses less
    assert five.regimes == {"a": RELAXED, "b": "level 2/4", "c": CRITICAL}
    for word in ("tepid", "level 0/2", "level 2/2"):
        with pytest.raises(ValueError, match="regime"):
            same.load_state_dict({**state, "regimes": {"a": word}})


def test_a_ladder_is_text_and_ends_with_an_auto_if_wanted():
    assert str(Accordion(levels=LADDER)).startswith(
        "Accordion(levels=[PowerSGD(rank=8), PowerSGD(rank=4), PowerSGD(rank=1)]"
    )
    assert (
        Accordion(levels=LADDER) == dataclasses.replace(Accordion(levels=LADDER)) != Accordion(PowerSGD(8), PowerSGD(1))
    )
    ladder = Accordion(levels=[Dense(), TopK(0.1), Auto(TopK(0.01))])
    assert ladder.candidates == (TopK(0.01),)
    ladder.resolve({"w": TopK(0.01)})
    assert ladder.specs("w") == (Dense(), TopK(0.1), TopK(0.01)) and ladder.specs("v")[-1] == Dense()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": [PowerSGD(4)]}, ValueError, "levels must hold at least two compression specs"),
        ({"levels": PowerSGD(4)}, ValueError, "levels must hold at least two compression specs"),
        ({"levels": [PowerSGD(4), 1]}, TypeError, r"levels\[1\] must be a compression spec"),
        ({"levels": [Auto(), PowerSGD(4)]}, TypeError, r"levels\[0\] must be a compression spec"),
        ({"levels": LADDER, "critical": TopK(0.1)}, ValueError, "levels takes the place of critical and relaxed"),
        ({"levels": LADDER, "relaxed": TopK(0.1)}, ValueError, "levels takes the place of critical and relaxed"),
    ],
    ids=str,
)
def test_levels_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Accordion(**arguments)

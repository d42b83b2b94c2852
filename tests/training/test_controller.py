"""Epochs, windows, levels, totals and what the logger hears, without any framework."""

from __future__ import annotations

import gc
import json
import logging
from unittest.mock import MagicMock

import pytest

from hvd_accordion import Accordion, AccordionBatchSize, Auto, Dense, PowerSGD, Regime, TopK
from hvd_accordion.comm.collectives import AllReduce, sent
from hvd_accordion.policy.assignment import assign
from hvd_accordion.policy.layers import Layer
from hvd_accordion.training import counters
from hvd_accordion.training.controller import Controller, Due
from hvd_accordion.training.reports import CompressionReport, LayerReport, Stats

A, B, SMALL, VECTOR = (
    Layer("a", (64, 64), "float32"),
    Layer("b", (128, 64), "float32"),
    Layer("small", (8, 8), "float32"),
    Layer("vector", (5000,), "float32"),
)
HIGH, LOW = TopK(0.2), TopK(0.01)


class Recorder:
    """A logger that remembers what it was told."""

    def __init__(self):
        self.epochs, self.windows = [], []

    def start(self, params):
        pass

    def log_epoch(self, epoch, metrics):
        self.epochs.append((epoch, dict(metrics)))

    def log_window(self, window, layers):
        self.windows.append((window, dict(layers)))


def accordion(**settings) -> Accordion:
    return Accordion(HIGH, LOW, **settings)


def make(policy, layers=(A, B), **settings) -> Controller:
    """A controller for two ranks; `policy`: one for all layers, or a dict by name."""
    names = list(policy) if isinstance(policy, dict) else [x.name for x in layers]
    return Controller(layers, assign(policy, names), 2, **settings)


def step(control: Controller, norms=None, lr=0.1, sent_bytes=0.0) -> list[str]:
    """One step as an engine takes it. Returns the layers whose norms were due; `norms`: of each, 1 by default."""
    return decide(control, control.after_update(sent_bytes, 0.0), norms, lr)


def decide(control: Controller, due: Due, norms=None, lr=0.1) -> list[str]:
    control.decide(due, lr, {name: (norms or {}).get(name, 1.0) for name in due.layers})
    return list(due.layers)


# epochs and windows


def test_epochs_end_by_steps_per_epoch():
    control = make(accordion(interval=2), steps_per_epoch=3)
    due = [step(control) for _ in range(15)]
    both = ["a", "b"]
    assert [i for i, names in enumerate(due) if names] == [2, 8, 14]  # ends of epochs 0, 2, 4
    assert due[2] == due[8] == both
    assert tuple(vars(control.counters)[key] for key in counters.COUNTS) == (15, 5, 0, 3)


def test_epochs_end_by_end_epoch():
    control = make(accordion(interval=2))
    due = []
    for steps in (2, 5, 3):  # epochs may differ in length
        assert not any(step(control) for _ in range(steps))
        ended = control.end_epoch()
        assert ended.epoch_ended
        due.append(decide(control, ended))
    assert due == [["a", "b"], [], ["a", "b"]]
    assert (control.step, control.epoch) == (10, 3)


def test_end_epoch_after_steps_per_epoch_does_not_count_twice():
    control = make(accordion(interval=1), steps_per_epoch=2)
    windows = 0
    for _ in range(3):
        for _ in range(2):
            windows += bool(step(control))
        assert not control.end_epoch()
    assert (control.epoch, windows) == (3, 3)


def test_end_epoch_cuts_an_epoch_of_steps_per_epoch_short():
    control = make(accordion(interval=1), steps_per_epoch=4)
    step(control)
    assert decide(control, control.end_epoch()) == ["a", "b"]
    assert [bool(step(control)) for _ in range(4)] == [False, False, False, True]
    assert control.epoch == 2


def test_end_epoch_without_a_step_is_no_epoch():
    control = make(accordion(), logger=Recorder())
    assert not control.end_epoch()
    assert control.epoch == 0 and control.logger.epochs == []


def test_windows_in_steps():
    control = make(accordion(unit="steps", interval=3))
    assert [i for i in range(1, 10) if step(control)] == [3, 6, 9]
    assert control.counters.window == 3


def test_levels_follow_the_norms():
    control = make(accordion(unit="steps", interval=2))
    assert control.specs() == {"a": HIGH, "b": HIGH}
    step(control)
    step(control)
    assert control.specs() == {"a": HIGH, "b": HIGH}  # nothing to compare with yet
    step(control)
    before = control.version
    assert step(control, {"a": 1.0, "b": 3.0}) == ["a", "b"]
    assert control.version != before
    assert control.specs() == {"a": LOW, "b": HIGH}
    assert (control.levels.regime("a"), control.levels.regime("b")) == (Regime.RELAXED, Regime.CRITICAL)


def test_what_is_measured():
    control = make(accordion(interval=3), steps_per_epoch=2)
    measured = []
    for _ in range(8):
        measured.append(control.levels.measured)
        step(control)
    assert measured == [["a", "b"]] * 2 + [[]] * 4 + [["a", "b"]] * 2
    assert make(accordion(unit="steps", interval=3)).levels.measured == ["a", "b"]
    assert make(HIGH).levels.measured == []


def test_only_layers_that_can_change_are_due():
    control = make(accordion(unit="steps", interval=1), (A, SMALL, VECTOR))
    assert step(control) == ["a"]
    assert control.specs() == {"a": HIGH, "small": Dense(), "vector": Dense()}


def test_two_accordions_with_their_own_intervals():
    policy = {"a": accordion(unit="steps", interval=2), "b": accordion(unit="steps", interval=3, eta=9.0)}
    control = make(policy)
    due = [step(control, {"a": 1.0, "b": float(i)}) for i in range(1, 7)]
    assert due == [[], ["a"], ["b"], ["a"], [], ["a", "b"]]
    assert control.specs() == {"a": LOW, "b": LOW}  # b: |3 - 6| / 3 < 9


def test_steps_and_epochs_side_by_side():
    control = make({"a": accordion(unit="steps", interval=2), "b": accordion(interval=1)}, steps_per_epoch=3)
    assert [step(control) for _ in range(6)] == [[], ["a"], ["b"], ["a"], [], ["a", "b"]]


def test_one_accordion_for_two_layers_stays_one():
    shared = accordion()
    assert len(make({"a": shared, "b": shared}).levels.observers) == 1
    assert len(make({"a": accordion(), "b": accordion()}).levels.observers) == 2


def test_windows_without_adaptive_layers_do_not_pile_up():
    shared = accordion(unit="steps", interval=2)
    control = make({"small": shared, "a": shared}, (SMALL,))
    for _ in range(6):
        assert step(control) == []
    control.set_layers([SMALL, A])  # unfrozen, say
    assert control.end_epoch().layers == ()  # its own window has only begun


def test_among_another_number_of_ranks_other_layers_may_be_worth_compressing():
    high = TopK(0.2, algorithm="allgather")  # each rank gets the entries of all others
    control = make(Accordion(high, high, unit="steps", interval=1))
    assert control.levels.adaptive == [A, B]
    control.move(16, None)
    assert control.levels.adaptive == [] and control.specs() == {"a": Dense(), "b": Dense()}
    control.move(3, None)
    assert control.levels.adaptive == [A, B] and control.specs() == {"a": high, "b": high}


def test_ranks_that_cannot_share_a_small_batch_are_refused():
    control = make(Dense(), batch_size=AccordionBatchSize(8, 16))
    control.move(4, None)
    with pytest.raises(ValueError, match="small must be a multiple of the 3 ranks, got 8"):
        control.move(3, None)


def test_a_layer_that_comes_late_is_critical_after_its_first_check():
    shared = accordion(unit="steps", interval=2)
    control = make({"small": shared, "a": shared}, (SMALL,))
    for _ in range(5):
        step(control)
    control.set_layers([SMALL, A])
    assert step(control) == ["a"]
    assert control.levels.regime("a") is Regime.CRITICAL


# the learning rate


def test_the_rate_is_wanted_after_the_first_step_of_an_epoch_or_window():
    def wanted(policy, **settings):
        control, steps = make(policy, **settings), []
        for i in range(1, 8):
            due = control.after_update(0, 0)
            if due.lr:
                steps.append(i)
            decide(control, due)
        return steps

    assert wanted(accordion(), steps_per_epoch=3) == [1, 4, 7]
    assert wanted(accordion(unit="steps", interval=2)) == [1, 3, 5, 7]
    assert wanted(HIGH, steps_per_epoch=3) == []


def test_a_drop_of_the_rate_between_checks_makes_layers_critical():
    control = make(accordion(interval=3), steps_per_epoch=2)
    for _ in range(8):
        step(control)
    assert control.specs() == {"a": LOW, "b": LOW}
    version, before = control.version, control.stats.critical_layers
    step(control, lr=0.01)
    assert control.version != version and control.specs() == {"a": HIGH, "b": HIGH}
    step(control, lr=0.01)
    assert control.stats.critical_layers == before + 1  # the first of the two steps still ran relaxed
    while not step(control, lr=0.01):
        assert control.specs() == {"a": HIGH, "b": HIGH}
    assert control.specs() == {"a": LOW, "b": LOW}


def test_a_drop_reaches_every_accordion():
    control = make({"a": accordion(unit="steps", interval=1), "b": accordion(unit="steps", interval=1)})
    step(control)
    step(control)
    assert control.specs() == {"a": LOW, "b": LOW}
    control.decide(Due(lr=True), 0.01)
    assert control.specs() == {"a": HIGH, "b": HIGH}
    version = control.version
    control.decide(Due(lr=True), 0.01)
    assert control.version == version


# an Accordion in epochs that never hears of one


def test_an_accordion_that_never_hears_of_an_epoch_raises(monkeypatch):
    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 5)
    control = make(accordion())
    for _ in range(5):
        step(control)
    with pytest.raises(ValueError, match=r"steps_per_epoch is None.*end_epoch\(\).*5 steps.*unit=\"steps\""):
        step(control)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [(accordion(), {"steps_per_epoch": 100}), (accordion(unit="steps"), {}), (HIGH, {}), (Dense(), {})],
)
def test_who_needs_no_epochs_may_go_on_without(policy, settings, monkeypatch):
    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 5)
    control = make(policy, **settings)
    for _ in range(20):
        step(control)


def test_after_one_end_epoch_later_epochs_may_be_long(monkeypatch):
    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 5)
    control = make(accordion())
    step(control)
    decide(control, control.end_epoch())
    for _ in range(20):
        step(control)


def warnings_at_the_end_of(control_of_steps, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hvd_accordion"):
        control_of_steps()
        gc.collect()
    return [record.getMessage() for record in caplog.records]


def test_a_training_without_an_epoch_is_warned_of_when_it_ends(caplog):
    def silent():
        control = make(accordion())
        for _ in range(3):
            step(control)

    (message,) = warnings_at_the_end_of(silent, caplog)
    assert "in 3 steps" in message and "steps_per_epoch" in message and "end_epoch()" in message


@pytest.mark.parametrize("ends", [True, False])
def test_a_logger_that_hears_of_no_epoch_is_warned_of(ends, caplog):
    def trained():
        control = make(HIGH)
        control.log_to(MagicMock())
        step(control)
        if ends:
            decide(control, control.end_epoch())

    found = warnings_at_the_end_of(trained, caplog)
    assert [text.startswith("logger: no epoch ended in 1 steps") for text in found] == ([] if ends else [True])


def test_no_warning_where_an_epoch_was_told_or_none_is_needed(caplog):
    def told():
        control = make(accordion())
        step(control)
        decide(control, control.end_epoch())

    def in_steps():
        step(make(accordion(unit="steps")))

    def by_count():
        step(make(accordion(), steps_per_epoch=10))

    def without_accordion():
        step(make(HIGH))

    def without_steps():
        make(accordion())

    for training in (told, in_steps, by_count, without_accordion, without_steps):
        assert warnings_at_the_end_of(training, caplog) == [], training.__name__


# totals


def test_totals_of_a_training():
    control = make(accordion(unit="steps", interval=1))
    dense = (64 * 64 + 128 * 64) * 4.0  # one rank of two sends each byte once
    for norms in ({}, {"b": 5.0}, {}):
        decide(control, control.after_update(1000.0, 0.25), norms)
    stats = control.stats
    assert (stats.steps, stats.sent_bytes, stats.dense_bytes, stats.exchange_seconds) == (3, 3000.0, 3 * dense, 0.75)
    assert stats.ratio == dense / 1000
    # steps 1 and 2 ran critical; then a was relaxed and b, of two thirds of the bytes, was not
    assert stats.critical_layers == pytest.approx(2.5)
    assert stats.critical_bytes == pytest.approx(2 + 2 / 3)
    assert stats.critical_fraction == pytest.approx(2.5 / 3)


# many steps at once, as a graph tells of them


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (HIGH, {}),
        (PowerSGD(4, start_after=5), {}),
        (accordion(unit="steps", interval=4), {}),
        ({"a": accordion(unit="steps", interval=4), "b": accordion(interval=1)}, {"steps_per_epoch": 12}),
        (accordion(interval=2), {"steps_per_epoch": 8}),
    ],
    ids=["spec", "start_after", "steps", "both", "epochs"],
)
def test_many_steps_at_once_are_as_good_as_one_by_one(policy, settings):
    """Where, as promised, only the last of them ends an epoch or a window."""
    at_once, singly = make(policy, logger=Recorder(), **settings), make(policy, logger=Recorder(), **settings)
    for steps in (1, 3, 4, 3, 1, 2, 2, 4, 4):
        due = at_once.after_update(3.0 * steps, 0.25 * steps, steps)
        *before, last = [singly.after_update(3.0, 0.25) for _ in range(steps)]
        assert not any(x.layers or x.epoch_ended for x in before)
        assert (last.layers, last.epoch_ended) == (due.layers, due.epoch_ended)
        for control in (at_once, singly):
            decide(control, due, {"a": float(control.counters.window), "b": 1.0})
        states = at_once.state_dict(), singly.state_dict()
        for part in ("stats", "epoch_start"):
            assert states[0].pop(part) == pytest.approx(states[1].pop(part))
        assert states[0] == states[1]
        assert (at_once.specs(), at_once.levels.measured) == (singly.specs(), singly.levels.measured)
    assert at_once.stats.steps == 24 and at_once.stats.dense_bytes == 24 * at_once.levels.dense_bytes
    assert at_once.logger.windows == singly.logger.windows
    for (epoch, metrics), (other, its) in zip(at_once.logger.epochs, singly.logger.epochs, strict=True):
        assert epoch == other and metrics == pytest.approx(its)


def test_steps_of_one_regime_count_as_many():
    control = make(accordion(unit="steps", interval=1))
    step(control)
    step(control, {"b": 9.0})
    assert control.specs() == {"a": LOW, "b": HIGH}
    before = control.stats.critical_layers, control.stats.critical_bytes
    control.after_update(0, 0, steps=6)
    assert control.stats.critical_layers - before[0] == pytest.approx(6 * 1 / 2)
    assert control.stats.critical_bytes - before[1] == pytest.approx(6 * 2 / 3)


@pytest.mark.parametrize(("steps", "begun"), [(4, False), (5, True), (9, True)])
def test_power_sgd_begins_even_in_the_midst_of_many_steps(steps, begun):
    control = make(PowerSGD(4, start_after=5))
    before = control.version
    control.after_update(0, 0, steps)
    assert (control.version != before) is begun and control.specs()["a"].lossy is begun
    before = control.version
    control.after_update(0, 0, 20)
    assert (control.version != before) is not begun and control.specs()["a"].lossy


def test_windows_inside_of_many_steps_are_not_made_up():
    control = make(accordion(unit="steps", interval=3), steps_per_epoch=100)
    assert control.after_update(0, 0, 8) == Due()
    assert control.after_update(0, 0, 1) == Due(("a", "b"))


def test_epochs_inside_of_many_steps_are_one():
    control = make(accordion(interval=1), steps_per_epoch=3)
    due = control.after_update(0, 0, 10)
    assert due.epoch_ended
    decide(control, due)
    assert (control.epoch, control.step, control.counters.step_of_epoch) == (1, 10, 0)


def test_many_steps_without_an_epoch_raise_too(monkeypatch):
    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 5)
    make(accordion()).after_update(0, 0, 5)
    with pytest.raises(ValueError, match="steps_per_epoch is None"):
        make(accordion()).after_update(0, 0, 6)


def test_totals_where_nothing_adapts():
    control = make(HIGH)
    control.after_update(10.0, 0.0)
    assert control.stats.critical_fraction == control.stats.critical_bytes == 0.0
    assert Stats().ratio == 1.0 and Stats().critical_fraction == 0.0


def test_stats_since_an_earlier_moment():
    early = Stats(2, 100.0, 400.0, 1.0, 2.0, 1.5)
    late = Stats(6, 150.0, 1400.0, 3.0, 4.0, 2.0)
    assert late.since(early) == Stats(4, 50.0, 1000.0, 2.0, 2.0, 0.5)
    assert late.since(early).metrics() == {
        "sent_bytes": 50.0,
        "dense_bytes": 1000.0,
        "compression_ratio": 20.0,
        "critical_layers": 0.5,
        "critical_bytes": 0.125,
        "exchange_seconds": 2.0,
    }
    assert late.since(late).metrics()["critical_layers"] == 0.0


# the logger


def test_the_logger_hears_of_epochs_and_windows():
    control = make(accordion(interval=1), (A, SMALL), steps_per_epoch=2, logger=Recorder())
    for i in range(6):
        step(control, {"a": 2.0}, sent_bytes=10.0 * (i + 1))
    epochs, windows = control.logger.epochs, control.logger.windows
    assert [epoch for epoch, _ in epochs] == [0, 1, 2]
    assert [metrics["sent_bytes"] for _, metrics in epochs] == [30.0, 70.0, 110.0]  # of the epoch alone
    dense = (64 * 64 + 64) * 4.0
    assert [metrics["dense_bytes"] for _, metrics in epochs] == [2 * dense] * 3
    assert [metrics["critical_layers"] for _, metrics in epochs] == [1.0, 1.0, 0.0]
    assert [window for window, _ in windows] == [0, 1, 2]
    assert all(list(layers) == ["a"] for _, layers in windows)
    first, second = windows[0][1]["a"], windows[1][1]["a"]
    assert (first.norm, first.ratio, first.regime, first.spec) == (2.0, None, "critical", str(HIGH))
    assert (second.norm, second.ratio, second.regime, second.spec) == (2.0, 0.0, "relaxed", str(LOW))
    # ceil(k d) values and places, and one block
    assert first.bytes_per_step == 820 * 6 + 4 and second.bytes_per_step == 41 * 6 + 4


def test_no_window_is_logged_where_nothing_adapts():
    control = make(HIGH, steps_per_epoch=1, logger=Recorder())
    step(control)
    assert len(control.logger.epochs) == 1 and control.logger.windows == []


def test_two_accordions_due_at_once_are_one_window():
    control = make(
        {"a": accordion(unit="steps", interval=1), "b": accordion(unit="steps", interval=2)}, logger=Recorder()
    )
    step(control)
    step(control)
    assert [list(layers) for _, layers in control.logger.windows] == [["a"], ["a", "b"]]


# the user's Accordion, start_after, state


def test_the_users_accordion_stays_untouched():
    mine = accordion(unit="steps", interval=1)
    first, second = make(mine), make(mine)
    step(first)
    step(first)
    assert first.specs()["a"] == LOW
    assert mine.state_dict() == accordion().state_dict() and mine.spec("a") == HIGH
    assert second.specs()["a"] == HIGH  # nor do two trainings share it


def test_power_sgd_begins_at_its_step():
    control = make(PowerSGD(4, start_after=2), steps_per_epoch=10)
    seen = []
    for _ in range(4):
        seen.append((control.specs()["a"], control.version))
        step(control)
    assert [spec.lossy for spec, _ in seen] == [False, False, True, True]
    versions = [version for _, version in seen]
    assert versions[0] == versions[1] != versions[2] == versions[3]


def test_state_goes_through_json_and_goes_on_alike():
    def fresh():
        policy = {"a": accordion(unit="steps", interval=2), "b": accordion(interval=1)}
        return make(policy, steps_per_epoch=3, logger=Recorder())

    def go_on(control):
        return [(step(control, {"a": 1.0 + i, "b": 2.0}, sent_bytes=5.0), control.specs()) for i in range(5)]

    control = fresh()
    for i in range(7):
        step(control, {"a": 1.0, "b": 1.0 + i}, sent_bytes=3.0)
    loaded = fresh()
    version = loaded.version
    loaded.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert loaded.version != version and loaded.state_dict() == control.state_dict()
    assert (loaded.specs(), loaded.levels.measured, loaded.stats) == (
        control.specs(),
        control.levels.measured,
        control.stats,
    )
    assert go_on(loaded) == go_on(control)
    assert loaded.state_dict() == control.state_dict()
    assert loaded.logger.epochs == control.logger.epochs[2:]


def checked(policy, **settings) -> Controller:
    """After two checks: "a" is relaxed, "b" is critical."""
    control = make(policy, **settings)
    for norms in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 9.0}):
        step(control, norms)
    return control


EACH_STEP = {"unit": "steps", "interval": 1}


def test_a_training_without_an_accordion_takes_up_counts_and_totals_of_one_with():
    saved = checked(accordion(**EACH_STEP))
    fixed = make(HIGH)
    left = fixed.load_state_dict(saved.state_dict())
    assert left == ["regimes of layers that no Accordion decides now: a, b"]
    assert fixed.step == 2 and fixed.stats == saved.stats and set(fixed.specs().values()) == {HIGH}
    assert make(HIGH).load_state_dict(make(accordion()).state_dict()) == ["an Accordion: compression holds none"]


def test_an_accordion_starts_anew_from_a_training_without_one():
    control = make(HIGH)
    step(control)
    used = checked(accordion(**EACH_STEP))
    assert used.load_state_dict(control.state_dict()) == ["an Accordion starts anew, for no regimes were saved of a, b"]
    assert used.step == 1 and set(used.specs().values()) == {HIGH} and used.levels.observers[0].lr is None


def test_accordions_take_up_regimes_by_the_names_of_layers():
    saved = checked(accordion(**EACH_STEP)).state_dict()
    two = make({"a": accordion(**EACH_STEP), "b": accordion(**EACH_STEP)})
    assert two.load_state_dict(saved) == [] and two.specs() == {"a": LOW, "b": HIGH}
    assert [a.norms for a in two.levels.observers] == [{"a": 1.0}, {"b": 9.0}] and two.levels.observers[1].lr == 0.1
    one = make(accordion(**EACH_STEP))
    assert one.load_state_dict(two.state_dict()) == [] and one.state_dict() == saved
    fewer = make({"a": accordion(**EACH_STEP), "b": HIGH})
    assert fewer.load_state_dict(saved) == ["regimes of layers that no Accordion decides now: b"]
    assert fewer.levels.observers[0].norms == {"a": 1.0}
    other = make(accordion(), (Layer("c", (64, 64), "float32"),))
    assert len(other.load_state_dict(saved)) == 2 and other.levels.observers[0].norms == {}


def test_a_batch_size_that_came_or_went():
    policy, batch = accordion(**EACH_STEP), AccordionBatchSize(4, 8, warmup=0, **EACH_STEP)
    saved, without = make(policy, batch_size=batch), make(policy)
    assert without.load_state_dict(saved.state_dict()) == ["an AccordionBatchSize: batch_size is None"]
    assert saved.load_state_dict(without.state_dict()) == ["an AccordionBatchSize, which starts anew"]


@pytest.mark.parametrize("broken", ["window", "stats", "regimes", "chosen"])
def test_broken_state_changes_nothing(broken):
    saved = checked(accordion(**EACH_STEP)).state_dict()
    if broken == "regimes":
        saved["policies"][0]["state"]["regimes"]["b"] = "tepid"
    else:
        del saved[broken]
    control = make({"a": accordion(), "b": accordion()})
    before = json.dumps(control.state_dict())
    with pytest.raises((KeyError, ValueError)):
        control.load_state_dict(saved)
    assert json.dumps(control.state_dict()) == before


def test_a_loaded_training_that_had_epochs_is_not_warned_of(caplog):
    def resumed():
        before = make(accordion())
        step(before)
        decide(before, before.end_epoch())
        after = make(accordion())
        after.load_state_dict(before.state_dict())
        step(after)

    assert warnings_at_the_end_of(resumed, caplog) == []


# an Auto: dense until it has chosen

AUTO = Auto((PowerSGD(2), LOW))
CHOICES = {"a": PowerSGD(2), "b": Dense()}


def test_an_auto_may_choose_for_the_layers_that_it_can_compress():
    control = make(AUTO, (A, B, SMALL, VECTOR))
    assert control.levels.candidates() == {"a": (PowerSGD(2), LOW), "b": (PowerSGD(2), LOW)}
    assert make({"a": AUTO, "b": HIGH}).levels.candidates() == {"a": (PowerSGD(2), LOW)}
    assert make(accordion()).levels.candidates() == {} and make(AUTO, (SMALL, VECTOR)).levels.candidates() == {}
    assert make(AUTO, (SMALL,), min_numel=64).levels.candidates() == {"small": (PowerSGD(2), LOW)}


def test_everything_is_dense_until_the_auto_has_chosen():
    control = make(AUTO, (A, B, SMALL))
    assert control.undecided and set(control.specs().values()) == {Dense()}
    before = control.version
    control.choose(CHOICES)
    assert control.version != before and not control.undecided
    assert control.specs() == {"a": PowerSGD(2), "b": Dense(), "small": Dense()}
    assert not make(HIGH).undecided and not make(AUTO, (SMALL,)).undecided


def test_what_nobody_chose_for_stays_dense():
    control = make(AUTO, (A, B, SMALL))
    control.choose({"a": LOW, "small": LOW})  # b's gradients are sparse, say; small is none of its layers
    assert not control.undecided and control.levels.chosen == {"a": LOW, "b": Dense()}


def test_a_layer_that_comes_late_is_to_be_chosen_for():
    control = make({"a": AUTO, "b": AUTO}, (A,))
    control.choose({"a": LOW})
    control.set_layers([A, B])
    assert control.undecided and control.specs() == {"a": LOW, "b": Dense()}
    control.choose({"a": LOW, "b": LOW})
    assert not control.undecided and control.specs() == {"a": LOW, "b": LOW}


def test_an_accordion_whose_relaxed_side_is_an_auto_is_adaptive():
    control = make(Accordion(HIGH, AUTO, unit="steps", interval=1), (A, B, SMALL))
    assert [x.name for x in control.levels.adaptive] == control.levels.measured == ["a", "b"]
    assert control.undecided and control.specs() == {"a": HIGH, "b": HIGH, "small": Dense()}
    step(control)
    step(control, {"b": 9.0})
    assert control.specs() == {"a": Dense(), "b": HIGH, "small": Dense()}  # relaxed, but nothing chosen yet
    control.choose({"a": LOW, "b": PowerSGD(2)})
    assert control.specs() == {"a": LOW, "b": HIGH, "small": Dense()}
    step(control, {"b": 9.0})
    assert control.specs() == {"a": LOW, "b": PowerSGD(2), "small": Dense()}


def test_an_autos_choice_begins_at_its_step():
    late = PowerSGD(4, start_after=3)
    control = make(Auto(late))
    control.choose({"a": late, "b": late})
    seen = []
    for _ in range(4):
        seen.append(control.specs()["a"])
        before = control.version
        step(control)
        assert (control.version != before) is (len(seen) == 3)
    assert seen == [Dense(), Dense(), Dense(), late]


def saved_and_loaded(control: Controller, fresh: Controller) -> Controller:
    fresh.load_state_dict(json.loads(json.dumps(control.state_dict())))
    return fresh


def test_a_choice_is_saved_and_loaded():
    control = make(AUTO)
    control.choose(CHOICES)
    fresh = make(AUTO)
    before = fresh.version
    loaded = saved_and_loaded(control, fresh)
    assert loaded.version != before and not loaded.undecided and loaded.specs() == CHOICES
    assert loaded.state_dict() == control.state_dict()
    control.choose({"a": LOW, "b": LOW})
    assert saved_and_loaded(make(AUTO), control).undecided  # what is loaded counts, be it nothing


def test_a_saved_choice_is_the_same_spec_wherever_it_is_loaded():
    gathered = TopK(0.1, algorithm="allgather")
    policy = Auto((gathered, LOW))
    few = Controller((A, B), assign(policy, ["a", "b"]), 2)
    few.choose({"a": LOW, "b": gathered})
    many = saved_and_loaded(few, Controller((A, B), assign(policy, ["a", "b"]), 16))
    assert many.specs() == {"a": LOW, "b": Dense()}  # an allgather of 16 ranks would be longer than b
    back = saved_and_loaded(many, Controller((A, B), assign(policy, ["a", "b"]), 2))
    assert back.specs() == {"a": LOW, "b": gathered}
    reordered = saved_and_loaded(few, make(Auto((LOW, PowerSGD(2), gathered))))
    assert reordered.specs() == {"a": LOW, "b": gathered}


def test_a_choice_that_is_no_candidate_any_more_is_to_be_made_anew():
    control = make(AUTO)
    control.choose(CHOICES)
    other = saved_and_loaded(control, make(Auto(LOW)))
    assert other.undecided and other.specs() == {"a": Dense(), "b": Dense()} and other.levels.chosen == {"b": Dense()}
    fixed = saved_and_loaded(control, make({"a": HIGH, "b": AUTO}))
    assert not fixed.undecided and fixed.specs() == {"a": HIGH, "b": Dense()}
    fewer = saved_and_loaded(control, Controller((B,), {"b": AUTO}, 2))
    assert not fewer.undecided and fewer.levels.chosen == {"b": Dense()}


# reports


def test_report_rows_and_table():
    control = make(accordion(unit="steps", interval=1), (A, SMALL, VECTOR))
    step(control)
    step(control)
    row_bytes = {
        name: spec.bytes_per_step(control.layers[name].shape, "float32", 2) for name, spec in control.specs().items()
    }
    report = control.report(row_bytes)
    own = 41 * 6 + 4
    total = own + 64 * 4 + 5000 * 4
    assert list(report) == [
        LayerReport("a", (64, 64), "TopK(ratio=0.01)", "relaxed", own, 16384.0, own / total),
        LayerReport("small", (8, 8), "Dense()", None, 256.0, 256.0, 256 / total),
        LayerReport("vector", (5000,), "Dense()", None, 20000.0, 20000.0, 20000 / total),
    ]
    assert (len(report), report[0].name, report.sent_bytes, report.dense_bytes) == (3, "a", total, 36640.0)
    assert sum(row.share for row in report) == pytest.approx(1.0)
    lines = str(report).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "shape", "compression", "regime", "bytes", "a", "step", "dense", "share"],
        ["a", "64x64", "TopK(ratio=0.01)", "relaxed", "250", "16,384", "1.2%"],
        ["small", "8x8", "Dense()", "-", "256", "256", "1.2%"],
        ["vector", "5000", "Dense()", "-", "20,000", "20,000", "97.5%"],
        ["total", "1.8x", "less", "20,506", "36,640"],
    ]
    assert len({len(line) for line in lines}) == 1  # columns are aligned


def test_a_report_of_nothing_sent():
    report = make(HIGH).report({"a": 0.0, "b": 0.0})
    assert [row.share for row in report] == [0.0, 0.0]
    assert "1.0x less" in str(report)
    assert str(CompressionReport()).splitlines()[0].startswith("layer")


def test_a_scalar_is_printed_as_one():
    assert "scalar" in str(CompressionReport((LayerReport("s", (), "Dense()", None, 4.0, 4.0, 1.0),)))


def test_dense_bytes_are_those_of_an_allreduce():
    control = Controller((A,), assign(HIGH, ["a"]), 4)
    assert control.levels.dense_bytes == sent(AllReduce, 64 * 64 * 4, 4) == 1.5 * 64 * 64 * 4

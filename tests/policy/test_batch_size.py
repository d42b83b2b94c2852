"""The rule over the batch size: regimes, rates, counts and reports, without any framework."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_accordion import Accordion, AccordionBatchSize, Regime, TopK
from hvd_accordion.policy.assignment import assign
from hvd_accordion.policy.batch_size import limits, whole_norm
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.norm_sampling import scale
from hvd_accordion.training.controller import Controller, Due

CRITICAL, RELAXED = Regime.CRITICAL, Regime.RELAXED
A, B = Layer("a", (64, 64), "float32"), Layer("b", (300, 100), "float32")


def rule(**options) -> AccordionBatchSize:
    return AccordionBatchSize(512, 4096, **options)


def grown(**options) -> AccordionBatchSize:
    """Since epoch 20."""
    batch = rule(**options)
    batch.observe(1.0, 0.1, 10)
    batch.observe(1.0, 0.1, 20)
    return batch


# the rule


def test_the_rate_warms_up_as_in_the_paper():
    batch = grown()
    assert batch.passes == 8
    assert [batch.lr_scale(20 + i) for i in range(8)] == pytest.approx([1, 2.4, 3.8, 5.2, 6.6, 8, 8, 8])
    assert [grown(warmup=0).lr_scale(20 + i) for i in range(2)] == [8.0, 8.0]
    assert [grown(warmup=1).lr_scale(20 + i) for i in range(3)] == [1.0, 8.0, 8.0]


def test_small_until_two_windows_have_been_compared():
    batch = rule()
    assert (batch.passes, batch.lr_scale(7)) == (1, 1.0)
    assert batch.observe(4.0, 0.1, 1) is CRITICAL and batch.passes == 1
    assert batch.observe(3.0, 0.1, 11) is RELAXED and batch.passes == 8


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_shrinks_the_batch_and_the_rate_at_once(norm):
    batch = grown()
    assert batch.observe(norm, 0.1, 30) is CRITICAL
    assert (batch.passes, batch.lr_scale(30), batch.lr_scale(99)) == (1, 1.0, 1.0)


@pytest.mark.parametrize("norm", [0.0, 0.51, 1.49, 2.5, 9.0])
def test_whatever_a_large_batch_does_to_the_norm_it_neither_shrinks_nor_warms_up_again(norm):
    batch = grown()
    assert batch.observe(norm, 0.1, 30) is RELAXED
    assert (batch.passes, batch.lr_scale(30)) == (8, 8.0)


def test_a_drop_of_the_rate_shrinks_it_until_the_next_check_after_which_it_warms_up_anew():
    batch = grown()
    assert not batch.observe_lr(0.051) and batch.passes == 8
    assert batch.observe_lr(0.05) and batch.passes == 1
    assert batch.observe(1.0, 0.05, 40) is RELAXED
    assert [batch.lr_scale(40 + i) for i in (0, 1, 5)] == pytest.approx([1, 2.4, 8])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0.01, 2))
def test_grows_when_an_accordion_of_one_layer_first_relaxes(norms, eta):
    batch, accordion = rule(eta=eta), Accordion(eta=eta)
    relaxed = False
    for i, norm in enumerate(norms):
        relaxed = relaxed or accordion.observe({"w": norm}, 0.1)["w"] is RELAXED
        assert batch.observe(norm, 0.1, i) is (RELAXED if relaxed else CRITICAL)


def test_state_survives_json():
    batch = grown()
    other = rule()
    other.load_state_dict(json.loads(json.dumps(batch.state_dict())))
    assert (other.passes, other.lr_scale(22), other.lr) == (8, batch.lr_scale(22), 0.1)
    assert other.observe(1.6, 0.04, 30) is CRITICAL


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"small": 0}, ValueError, "small must be an integer >= 1, got 0"),
        ({"small": 8.0}, TypeError, "small must be an integer >= 1, got 8.0"),
        ({"large": 512}, ValueError, "large must be a multiple of small=512 and more than that, got 512"),
        ({"large": 700}, ValueError, "large must be a multiple of small=512 and more than that, got 700"),
        ({"large": 256}, ValueError, "large must be a multiple of small=512"),
        ({"warmup": -1}, ValueError, "warmup must be an integer >= 0, got -1"),
        ({"eta": 0}, ValueError, r"eta must be a number in \(0"),
        ({"interval": 0}, ValueError, "interval must be an integer >= 1, got 0"),
        ({"unit": "days"}, ValueError, "unit must be one of"),
        ({"lr_drop": 1.0}, ValueError, "lr_drop must be"),
        ({"norm": "l1"}, ValueError, "norm must be one of"),
    ],
)
def test_what_is_out_of_range(given, error, message):
    with pytest.raises(error, match=message):
        AccordionBatchSize(**{"small": 512, "large": 4096, **given})


def test_ranks_must_share_a_small_batch_evenly():
    with pytest.raises(ValueError, match="batch_size: small must be a multiple of the 3 ranks, got 512"):
        Controller([A], {"a": TopK(0.1)}, 3, batch_size=rule())


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), max_size=5))
def test_the_norm_of_the_whole_is_that_of_all_entries(parts):
    norms = [math.sqrt(sum(x * x for x in part)) for part in parts]
    assert whole_norm(norms) == pytest.approx(math.sqrt(sum(x * x for part in parts for x in part)))


# the controller


def make(batch, layers=(A, B), policy=None, **settings) -> Controller:
    policies = assign(policy or TopK(0.1), [x.name for x in layers])
    return Controller(layers, policies, 2, batch_size=batch, **settings)


def update(control: Controller, whole=1.0, lr=0.1, steps=None) -> int:
    """An update as an engine makes it; returns of how many steps."""
    steps = steps or control.micro_batches()
    due = control.after_update(100.0, 0.0, steps)
    control.decide(due, lr, dict.fromkeys(due.layers, whole), dict.fromkeys(control.layers, whole) if due.model else {})
    return steps


def test_an_update_never_goes_beyond_an_epoch():
    control = make(rule(interval=1), steps_per_epoch=11)
    assert [update(control) for _ in range(22 + 4)] == [1] * 22 + [8, 3] * 2
    assert (control.epoch, control.step, control.stats.updates, control.stats.steps) == (4, 44, 26, 44)
    assert control.stats.dense_bytes == 44 * control.levels.dense_bytes


def test_nor_beyond_a_window_of_steps_its_own_or_an_accordions():
    accordion = Accordion(TopK(0.5), TopK(0.1), interval=5, unit="steps", eta=1e9)
    control = make(rule(interval=12, unit="steps", warmup=0), policy={"a": accordion, "b": accordion})
    sizes = [update(control) for _ in range(24 + 8)]
    assert sizes[:24] == [1] * 24
    assert sizes[24:] == [1, 5, 5, 1, 4, 5, 3, 2]  # windows end at 25, 30, 35, 36, 40, 45, 48 and 50
    assert control.counters.window == 50 // 5 + 48 // 12


@given(st.integers(1, 9), st.integers(1, 30), st.lists(st.integers(1, 12), max_size=3))
def test_limits_never_let_an_update_jump_over_an_end(passes, of_epoch, intervals):
    step = epoch = 0
    for _ in range(40):
        size = min(limits(passes, step, epoch, of_epoch, intervals))
        assert 1 <= size <= passes
        for interval in intervals:
            assert step // interval == (step + size - 1) // interval
        step, epoch = step + size, epoch + size
        assert epoch <= of_epoch
        epoch %= of_epoch


def test_the_rate_is_looked_at_after_the_first_update_of_an_epoch():
    control = make(rule(interval=1), steps_per_epoch=16)
    for _ in range(32):
        update(control)
    assert control.micro_batches() == 8
    assert control.after_update(1.0, 0.0, 8).lr
    assert not control.after_update(1.0, 0.0, 7).lr
    control.decide(Due(lr=True), 0.04)
    assert control.micro_batches() == 1 and control.lr_scale == 1.0


def test_the_norm_of_the_whole_is_estimated_from_watched_entries():
    control = make(rule(interval=1), steps_per_epoch=1)
    assert [control.batch.sample_size(x.numel) for x in (A, B)] == [4096, 8192]
    update(control, whole=3.0)
    assert control.batch.rule.norms == {"whole model": pytest.approx(math.hypot(3.0, 3.0 * scale(30_000, 8192)))}


def test_epochs_before_a_check_alone_are_measured():
    control = make(rule(interval=3), steps_per_epoch=2)
    measured = []
    for epoch in range(6):
        measured.append(control.measures_model)
        while control.epoch == epoch:
            update(control)
    assert measured == [True, False, False, True, False, False]
    assert not make(None).measures_model


def test_the_report_shows_what_large_batches_save():
    control = make(rule(interval=1, warmup=0), steps_per_epoch=8)
    before = control.report({"a": 800.0, "b": 80.0})
    assert before.sent_bytes == 880 and before.batch.startswith("batch size 512 (critical): 1 micro-batch of 512")
    for _ in range(16):
        update(control)
    after = control.report({"a": 800.0, "b": 80.0})
    assert [row.sent_bytes for row in after] == [100.0, 10.0]
    assert str(after).splitlines()[-1] == "batch size 4,096 (relaxed): 8 micro-batches of 512, learning rate x8"
    assert "batch size" not in str(make(None).report({"a": 1.0, "b": 1.0}))


def test_its_state_goes_with_the_controllers_and_the_users_object_is_left_alone():
    batch = rule(interval=1)
    control, other = make(batch, steps_per_epoch=8), make(batch, steps_per_epoch=8)
    for _ in range(17):
        update(control)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for each in (control, copy.deepcopy(control), other):
        assert [update(each) for _ in range(3)] == [8, 8, 8]
    assert other.state_dict() == control.state_dict() and batch.norms == {}
    assert make(None).load_state_dict(control.state_dict()) == ["an AccordionBatchSize: batch_size is None"]
    older = {key: part for key, part in make(None).state_dict().items() if key != "batch_size"}
    other.load_state_dict(older)  # of a version that had none, or of a training without


def test_nobody_who_tells_of_epochs_is_an_error(monkeypatch):
    monkeypatch.setattr("hvd_accordion.training.counters.MAX_STEPS_OF_EPOCH", 3)
    for batch in (rule(), rule(unit="steps")):  # the warm-up counts epochs in any case
        control = make(batch)
        with pytest.raises(ValueError, match="steps_per_epoch is None and end_epoch"):
            for _ in range(5):
                update(control)
    control = make(rule(unit="steps", warmup=0))
    assert [update(control) for _ in range(5)] == [1] * 5

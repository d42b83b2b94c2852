"""Adam's arithmetic and the schedules of 1-bit Adam and 0/1 Adam, without a framework."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion.ops import numpy as ops
from hvd_accordion.optim import adam
from hvd_accordion.optim.adam import Adam, Interval
from hvd_accordion.optim.momentum_schedule import MARKS, Counts, Kind, Schedule, is_stable, mark_interval


def kinds(schedule, steps):
    """Initials of the kinds of the first steps."""
    counts, found = Counts(), ""
    for _ in range(steps):
        kind = counts.kind(schedule)
        found += kind.name[0]
        counts.advance(schedule, kind)
    return found


def test_one_bit_adam_is_dense_in_the_warmup_and_then_never_again():
    assert kinds(Schedule(5), 12) == "DDDDDMMMMMMM"
    assert kinds(Schedule(None), 12) == "D" * 12


def test_zero_one_adam_updates_the_second_moment_at_growing_intervals():
    """Paper, section 4: k_(j+1) - k_j = 2^floor(j / kappa)."""
    found = kinds(Schedule(60, kappa=4), 60)
    dense = [t for t, kind in enumerate(found) if kind == "D"]
    expected = [0]
    while expected[-1] < 60:
        expected.append(expected[-1] + 2 ** ((len(expected) - 1) // 4))
    assert dense == [t for t in expected if t < 60]
    assert set(found) == {"D", "M"}


def test_zero_one_adam_steps_locally_after_the_warmup():
    assert kinds(Schedule(2, kappa=4, double_every=4, max_interval=4), 20) == "DD" + "MMMM" + "LMLM" + "LLLMLLLMLL"
    assert kinds(Schedule(1, kappa=4, double_every=1, max_interval=3), 12) == "D" + "MLLMLLMLLML"


def test_intervals_neither_overflow_nor_pass_the_largest():
    schedule = Schedule(1, double_every=1, max_interval=16)
    assert [schedule.exchange_interval(t) for t in (0, 1, 2, 3, 4, 5, 10**9)] == [1, 2, 4, 8, 16, 16, 16]
    assert np.array_equal(schedule.exchange_interval(np.arange(6)), [1, 2, 4, 8, 16, 16])
    assert Schedule(1, double_every=1, max_interval=1).exchange_interval(9) == 1


def test_the_warmup_ends_when_the_second_moment_is_stable():
    assert mark_interval(0.999) == 100 and mark_interval(0.95) == 2 and mark_interval(0.5) == 1
    assert not is_stable(0.0, 1.0) and is_stable(1.0, 1.0)
    assert not is_stable(0.0, 0.0) and not is_stable(1.0, float("nan"))
    assert [is_stable(1.0, now) for now in (0.95, 0.961, 1.04, 1.05)] == [False, True, True, False]
    schedule, counts = Schedule(None), Counts()
    for norm in [2.0**-t for t in range(20)] + [2.0**-20] * 20:
        counts.advance(schedule, Kind.DENSE)
        assert counts.is_mark(schedule, 1)
        counts.measured(norm)
        if counts.warmup > 0:
            break
    assert counts.step == counts.warmup == 21 + MARKS and not counts.is_mark(schedule, 1)
    assert counts.kind(schedule) is Kind.MOMENTUM


def test_an_intervals_mean_is_weighted_by_rates():
    rng = np.random.default_rng(0)
    moments, rates = rng.normal(size=(4, 3)), [0.0, 0.3, 0.0, 0.1]
    mean, interval = np.zeros(3), Interval()
    for m, rate in zip(moments, rates, strict=True):
        interval = interval.extended(rate, 0.9)
        mean = adam.blended(mean, m, interval.share(rate))
    np.testing.assert_allclose(mean, np.average(moments, axis=0, weights=rates))
    assert interval.rate == pytest.approx(0.4) and interval.decay == pytest.approx(0.9**4)
    assert np.array_equal(adam.blended(moments[0], moments[1], Interval().extended(0.7, 1.0).share(0.7)), moments[1])


def test_a_weight_without_gradients_stays():
    numbers, x, v = Adam(0.1, 0.9, 0.99, 1e-8, 0.0), np.ones(3), np.array([0.0, 1.0, 4.0])
    m = adam.masked(ops, np.full(3, 0.5), v)
    moved = numbers.moved(x, m, v, 1.0, Interval(0.1, 1.0))
    np.testing.assert_allclose(moved, [1.0, 1 - 0.05, 1 - 0.025])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a number in"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        adam.checked(**{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **arguments})


@pytest.mark.parametrize("name", ["warmup_steps", "kappa", "double_every", "max_interval"])
def test_schedules_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        Schedule(**{name: 0})

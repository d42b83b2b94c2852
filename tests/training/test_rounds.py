"""When fragments are exchanged, windows and epochs end: pure counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_accordion import AccordionSteps, LocalSteps
from hvd_accordion.training.rounds import Rounds, fragments_of


def exchanged(rounds, steps, rate=0.1):
    """Step (from 1) -> fragments that are exchanged after it."""
    return {step: after.fragments for step in range(1, steps + 1) if (after := rounds.stepped(rate)).fragments}


def test_every():
    assert exchanged(Rounds(LocalSteps(3)), 9) == {3: (0,), 6: (0,), 9: (0,)}


def test_fragments_in_turn():
    assert exchanged(Rounds(LocalSteps(4, fragments=2)), 8) == {2: (1,), 4: (0,), 6: (1,), 8: (0,)}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 120))
def test_each_fragment_once_in_every_steps(every, fragments, steps):
    fragments = min(every, fragments)
    found = exchanged(Rounds(LocalSteps(every, fragments=fragments)), steps)
    for k in range(fragments):
        at = [step for step, parts in found.items() if k in parts]
        offset = k * every // fragments
        assert at == [step for step in range(1, steps + 1) if step % every == offset % every]
    assert max((len(parts) for parts in found.values()), default=0) <= 1


def test_epochs():
    rounds = Rounds(LocalSteps(4), steps_per_epoch=6)
    ends = []
    for _ in range(12):
        after = rounds.stepped(0.1)
        if after.epoch_ends:
            ends.append((rounds.step, after.fragments))
            rounds.restart()
            rounds.next_epoch()
    assert ends == [(6, (0,)), (12, (0,))] and rounds.epoch == 2
    assert not rounds.end_epoch().epoch_ends


def test_windows_of_steps_observe_the_movement_over_the_rates():
    rounds = Rounds(LocalSteps(AccordionSteps(1, 4, interval=4, unit="steps")))
    for _ in range(3):
        assert not rounds.stepped(0.5).window_ends
    assert rounds.stepped(0.5).window_ends
    assert rounds.observe(6.0, 0.5) == pytest.approx(3.0)
    assert rounds.every == 1
    for _ in range(4):
        rounds.stepped(0.5)
    rounds.observe(6.2, 0.5)
    rounds.restart()
    assert rounds.every == 4 and rounds.metrics() == {"local_steps": 4.0, "critical_steps": 0.0}
    again = Rounds(rounds.settings)
    again.load_state_dict(rounds.state_dict())
    assert again.state_dict() == rounds.state_dict() and again.every == 4
    assert exchanged(rounds, 4, 0.5) == exchanged(again, 4, 0.5) == {4: (0,)}


def test_windows_of_epochs():
    rounds = Rounds(LocalSteps(AccordionSteps(1, 4, interval=2)))
    seen = []
    for _ in range(5):
        rounds.stepped(0.1)
        after = rounds.end_epoch()
        seen.append(after.window_ends)
        if after.window_ends:
            rounds.observe(1.0, 0.1)
        rounds.next_epoch()
    assert seen == [True, False, True, False, True] and rounds.window == 3


def test_epochs_that_never_end_are_an_error():
    rounds = Rounds(LocalSteps(AccordionSteps(1, 4)))
    with pytest.raises(ValueError, match="steps_per_epoch is None and end_epoch"):
        for _ in range(10_001):
            rounds.stepped(0.1)


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000), max_size=12), st.integers(1, 5))
def test_fragments_keep_the_order_of_layers(sizes, count):
    parts = fragments_of(sizes, count)
    assert len(parts) == count and [name for part in parts for name in part] == list(sizes)
    if sizes and count > 1:
        largest = max(sizes.values())
        assert all(sum(sizes[name] for name in part) <= sum(sizes.values()) / count + largest for part in parts)

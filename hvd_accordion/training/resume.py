"""What of a saved training fits one with other settings: pure functions of names and plain state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

State = Mapping[str, Any]  # of a policy: dicts by the names of layers, and values that are of all its layers
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Kept:
    """The state of a policy of one kind; of a policy of today, its state at the start and the layers that it decides."""

    kind: str
    state: State
    layers: tuple[str, ...] = ()

    def knows(self, names: Collection[str]) -> bool:
        """Whether there is something of one of these layers."""
        return any(name in names for name in self.names)

    @property
    def names(self) -> list[str]:
        """Of all layers of which there is something."""
        return list(dict.fromkeys(name for part in self.state.values() if isinstance(part, Mapping) for name in part))


def saved_policies(state: State) -> list[Kept]:
    """Those of `Controller.state_dict`, also as older versions wrote it."""
    if "accordions" in state:
        return [Kept("Accordion", mine) for mine in state["accordions"]]
    return [Kept(mine["kind"], mine["state"]) for mine in state["policies"]]


def policy_states(saved: Sequence[Kept], today: Sequence[Kept]) -> tuple[list[State], list[str]]:
    """What each of today's policies takes up of the saved ones, by the layers' names, and what is left, in words.

    A policy takes up what policies of its kind had saved of its layers; if there is nothing, it starts anew.
    """
    taken: dict[int, State] = {}
    left: list[str] = []
    for kind in dict.fromkeys(mine.kind for mine in (*saved, *today)):
        theirs, ours = ([x for x in kept if x.kind == kind] for kept in (saved, today))
        found = [_sources(theirs, ours, i) for i in range(len(ours))]
        taken |= {id(mine): _merged(f, mine.layers) if f else mine.state for mine, f in zip(ours, found, strict=True)}
        left += _left(kind, theirs, ours, [mine for mine, f in zip(ours, found, strict=True) if not f])
    return [taken[id(mine)] for mine in today], left


def _sources(saved: Sequence[Kept], today: Sequence[Kept], i: int) -> list[Kept]:
    sources = [theirs for theirs in saved if theirs.knows(today[i].layers)]
    if not sources and len(saved) == len(today) and not saved[i].names:
        return [saved[i]]  # it had observed nothing yet
    return sources


def _merged(sources: Sequence[Kept], names: Collection[str]) -> State:
    """Dicts with all entries of these names; of other values the first that is not None."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for mine in sources for key in mine.state):
        parts = [mine.state[key] for mine in sources]
        if all(isinstance(part, Mapping) for part in parts):
            merged[key] = {name: x for part in parts for name, x in part.items() if name in names}
        else:
            merged[key] = next((part for part in parts if part is not None), None)
    return merged


def _left(kind: str, saved: Sequence[Kept], today: Sequence[Kept], anew: Sequence[Kept]) -> list[str]:
    accordion = kind == "Accordion"
    policy, what = (kind if accordion else f"policy {kind}"), ("regimes" if accordion else "state")
    one = f"{'an' if accordion else 'a'} {policy}"
    decided = {name for mine in today for name in mine.layers}
    lost = [name for mine in saved for name in mine.names if name not in decided]
    left = [f"{what} of layers that no {policy} decides now: {in_words(lost)}"] if lost else []
    if saved and not today and not lost:
        left.append(f"{one}: compression holds none")
    was = "were" if accordion else "was"
    return left + [f"{one} starts anew, for no {what} {was} saved of {in_words(mine.layers)}" for mine in anew]


def in_words(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def warn_of(left: Sequence[str], stacklevel: int = 2) -> None:
    """One warning that names everything that a load of state has not taken up."""
    if left:
        warnings.warn(
            "state_dict was saved under other settings. What fits is taken up, but for: " + "; ".join(left),
            stacklevel=stacklevel + 1,
        )

"""What of a saved training fits one with other settings: pure functions of names and plain state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

State = Mapping[str, Any]
NOTHING: State = MappingProxyType(
    {"norms": {}, "ratios": {}, "regimes": {}, "lr": None, "grown": 0}
)  # a rule's at the start
SHOWN = 5  # names in a message


def accordion_states(saved: Sequence[State], layers: Sequence[Collection[str]]) -> tuple[list[State], list[str]]:
    """What each of today's Accordions takes up of the saved ones, by the layers' names, and what is left, in words.

    Args:
        saved: `Rule.state_dict` of each saved Accordion.
        layers: names of the layers that each Accordion of today decides.

    An Accordion of whose layers nothing was saved takes up `NOTHING`.
    """
    taken: list[State] = []
    for i, names in enumerate(map(frozenset, layers)):
        sources = [s for s in saved if any(name in names for name in s["norms"])]
        if not sources and len(saved) == len(layers) and not saved[i]["norms"]:
            sources = [saved[i]]  # it had not checked yet
        taken.append(_merged(sources, names) if sources else NOTHING)
    decided = {name for names in layers for name in names}
    lost = [name for s in saved for name in s["norms"] if name not in decided]
    left = [f"regimes of layers that no Accordion decides now: {in_words(lost)}"] if lost else []
    if saved and not layers and not lost:
        left.append("an Accordion: compression holds none")
    left += [
        f"an Accordion starts anew, for no regimes were saved of {in_words(names)}"
        for names, state in zip(layers, taken, strict=True)
        if state is NOTHING
    ]
    return taken, left


def _merged(sources: Sequence[State], names: Collection[str]) -> State:
    kept = {
        key: {name: x for s in sources for name, x in s[key].items() if name in names}
        for key in ("norms", "ratios", "regimes")
    }
    return {**kept, "lr": next((s["lr"] for s in sources if s["lr"] is not None), None)}


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

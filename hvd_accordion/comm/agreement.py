"""Compares settings between ranks before the first exchange. Different settings raise the same error on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

Gather = Callable[[bytes, str], list[bytes]]  # (this rank's bytes, name) -> every rank's bytes, of any length each


def require_equal(settings: Mapping[str, object], name: str, gather: Gather) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ.

    One gather of 32 bytes where they agree.
    """
    lines = [f"{key} = {value}" for key, value in settings.items()]
    text = "\n".join(lines).encode()
    if len(set(gather(hashlib.sha256(text).digest(), f"{name}.digests"))) == 1:
        return
    everyone = [theirs.decode().split("\n") for theirs in gather(text, f"{name}.settings")]
    raise ValueError(f"Ranks are configured differently: {first_difference(everyone)}")


def first_difference(everyone: Sequence[Sequence[str]]) -> str:
    """The first line that differs between rank 0 and another rank, as text."""
    reference = everyone[0]
    for rank, lines in enumerate(everyone[1:], 1):
        for i in range(max(len(reference), len(lines))):
            theirs, ours = (at[i] if i < len(at) else "nothing" for at in (lines, reference))
            if theirs != ours:
                return f"rank 0 has {ours!r}, rank {rank} has {theirs!r}"
    return "their texts are equal but not their digests"

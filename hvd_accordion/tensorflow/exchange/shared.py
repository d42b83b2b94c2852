"""The part of an exchange's state that is equal on all ranks, as one rank sends it to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_accordion.tensorflow.exchange.state import State
from hvd_accordion.tensorflow.transport import HorovodTransport

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shared:
    """By the position of the layers: names that Keras makes up may be others in another process.

    shapes: of the layers.
    singles, journal: counts, levels, and the controller's state.
    layers: of each, factors and the sums of its window.
    count, sums: micro-batches that wait for an update.
    """

    shapes: tuple[tuple[int, ...], ...]
    singles: Arrays
    journal: bytes
    layers: tuple[Arrays, ...]
    count: int
    sums: tuple[np.ndarray, ...]

    def fits(self, exchange: Any) -> bool:
        """Whether the exchange begins with the same layers."""
        return self.shapes[: len(exchange.shapes)] == exchange.shapes

    def give(self, state: State, first: int, sums: Any = None) -> None:
        """Puts it into the variables of layers from the position `first` on; if that is 0, into all others too.

        `sums`: LocalSums; where another number of micro-batches waits in them, they are taken from rank 0.
        """
        keys = list(state.slice_bytes)
        if first == 0:
            for name, v in state.singles.items():
                v.assign(self.singles[name])
            state.journal.assign(self.journal)
        for key, own in list(zip(keys, self.layers, strict=False))[first:]:
            for name, v in kept(state, key).items():
                if name in own and v.shape.is_compatible_with(own[name].shape):
                    v.assign(own[name])
        if sums is not None and int(sums.count) != self.count:
            sums.count.assign(self.count)
            for v, value in zip(sums.sums.values(), self.sums or map(tf.zeros_like, sums.sums.values()), strict=False):
                v.assign(value)


def shared(exchange: Any) -> Shared:
    """Of this rank's exchange."""
    state, sums = exchange.state, exchange.local_sums
    count = 0 if sums is None else int(sums.count)
    return Shared(
        exchange.shapes,
        {name: v.numpy() for name, v in state.singles.items()},
        state.journal.numpy(),
        tuple({name: v.numpy() for name, v in kept(state, key).items()} for key in state.slice_bytes),
        count,
        tuple(v.numpy() for v in sums.sums.values()) if count else (),
    )


def kept(state: State, key: str) -> dict[str, tf.Variable]:
    """All that is kept of a layer, and is equal on all ranks."""
    groups = {name: getattr(state, name) for name in ("summed", "summed_whole")}
    found = {name: group[key] for name, group in groups.items() if key in group}
    return {**found, **{f"memory.{part}": v for part, v in state.memory.get(key, {}).items()}}


def broadcast(
    state: State,
    transport: HorovodTransport,
    name: str,
    root_rank: int,
    count: tf.Variable | None,
    sums: Sequence[tf.Variable],
) -> None:
    """Gives every rank the state of `root_rank`, but for residuals; see `GradientExchange.broadcast`."""
    for i, v in enumerate(state.shared()):
        v.assign(transport.broadcast_from(v.read_value(), root_rank, f"{name}.{i}"))
    theirs = [transport.broadcast_from(v.read_value(), root_rank, f"{name}.sums.{i}") for i, v in enumerate(sums)]
    if count is not None:
        waiting = transport.broadcast_from(count.read_value(), root_rank, f"{name}.count")
        if int(waiting) != int(count):
            for v, value in zip([count, *sums], [waiting, *theirs], strict=True):
                v.assign(value)
    state.journal.assign(transport.broadcast_object(state.journal.numpy(), root_rank, name))

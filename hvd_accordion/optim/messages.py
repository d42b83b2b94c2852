"""One kind of message of a method: lists of tensors through the specs of their layers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression import Dense
from hvd_accordion.compression.base import Memory
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import assignment
from hvd_accordion.training.channel import Channel
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.vectors import Vectors, each


class Messages:
    """Messages of one kind, in the order of the controller's layers.

    Args:
        kind: part of the names of its exchanges; equal on all ranks.
        mode: "error_feedback": what was not sent goes with the next; "plain": compressed as it is, what was not sent is
            forgotten; "dense".
    """

    def __init__(self, kind: str, mode: str, ops: Ops, controller: Controller, seed: int, rank: int, size: int) -> None:
        self.kind, self.mode, self.ops, self.controller = kind, mode, ops, controller
        self._groups: dict[str, assignment.Group] = {}
        # seeds by kind and place: other random entries than another kind's, the same whatever a framework calls a variable
        places = {name: i for i, name in enumerate(controller.layers)}
        self._channel = Channel(
            ops, seed, rank, size, seed_name=lambda name: f"{kind}.{places[name]}", forgets=mode != "error_feedback"
        )

    @property
    def residual(self) -> MutableMapping[str, Tensor]:
        return self._channel.residual

    @property
    def memory(self) -> MutableMapping[str, Memory]:
        return self._channel.memory

    def load(self, residual: Mapping[str, Tensor], memory: Mapping[str, Memory]) -> None:
        self._channel.residual, self._channel.memory = dict(residual), dict(memory)

    def exchanges(self, vectors: Vectors) -> dict[str, Rounds[ExchangeResult]]:
        """To be run side by side; `vectors` stay as they are."""
        layers = self.controller.layers
        specs = dict.fromkeys(layers, Dense()) if self.mode == "dense" else self.controller.specs()
        groups = assignment.grouped([list(layers.values())], specs, self.residual)
        self._groups = {f"{self.kind}.{group.name}": group for group in groups}
        values = dict(zip(layers, each(lambda v: v * 1, vectors), strict=True))
        return {
            name: self._channel.exchange(group, [values[x.name] for x in group.layers], self.controller.step)
            for name, group in self._groups.items()
        }

    def received(self, answers: Mapping[str, ExchangeResult]) -> tuple[Vectors, Vectors]:
        """Means over the ranks, and what this rank holds unsent, zeros where that is nothing."""
        mean: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name, group in self._groups.items():
            result, names = answers[name], [layer.name for layer in group.layers]
            mean.update(zip(names, result.mean, strict=True))
            if result.residual is not None:
                left.update(zip(names, result.residual, strict=True))
        order = list(self.controller.layers)
        nothing = self.ops.zeros_like([mean[name] for name in order if name not in left])
        left.update(zip([name for name in order if name not in left], nothing, strict=True))
        return [mean[name] for name in order], [left[name] for name in order]

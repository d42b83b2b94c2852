"""Exchanges one kind of message of a method: lists of tensors, compressed by the specs of their layers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression import Dense
from hvd_accordion.compression.base import Memory
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import grouping
from hvd_accordion.policy.layers import Group
from hvd_accordion.training.channel import Channel
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.vectors import Vectors, each


class Messages:
    """Exchanges messages of one kind. Tensors are in the order of the controller's layers.

    Args:
        kind: prefix of the names of the exchanges, equal on all ranks.
        mode: "error_feedback": what is not sent is added to the next message. "plain": compressed, and what is not sent is
            dropped. "dense": not compressed.
        ops: the framework's primitives.
        controller: the layers and their specs.
        seed: of random compression.
        rank: this rank.
        size: number of ranks.
    """

    def __init__(self, kind: str, mode: str, ops: Ops, controller: Controller, seed: int, rank: int, size: int) -> None:
        self.kind, self.mode, self.ops, self.controller = kind, mode, ops, controller
        self._groups: dict[str, Group] = {}
        # seeds depend on kind and index: they differ between kinds, and do not depend on a framework's variable names
        indices = {name: i for i, name in enumerate(controller.layers)}
        self._channel = Channel(
            ops, seed, rank, size, seed_name=lambda name: f"{kind}.{indices[name]}", forgets=mode != "error_feedback"
        )

    @property
    def residual(self) -> MutableMapping[str, Tensor]:
        """Layer name -> what this rank has not sent yet."""
        return self._channel.residual

    @property
    def memory(self) -> MutableMapping[str, Memory]:
        """Layer name -> the spec's memory."""
        return self._channel.memory

    def load(self, residual: Mapping[str, Tensor], memory: Mapping[str, Memory]) -> None:
        """Restores saved residuals and memory."""
        self._channel.residual, self._channel.memory = dict(residual), dict(memory)

    def exchanges(self, vectors: Vectors) -> dict[str, Rounds[ExchangeResult]]:
        """Returns the exchanges of a message by name, to be run concurrently. `vectors` are not modified."""
        layers = self.controller.layers
        specs = dict.fromkeys(layers, Dense()) if self.mode == "dense" else self.controller.specs()
        groups = grouping.grouped([list(layers.values())], specs, self.residual)
        self._groups = {f"{self.kind}.{group.name}": group for group in groups}
        values = dict(zip(layers, each(lambda v: v * 1, vectors), strict=True))
        return {
            name: self._channel.exchange(group, [values[x.name] for x in group.layers], self.controller.step)
            for name, group in self._groups.items()
        }

    def receive(self, results: Mapping[str, ExchangeResult]) -> tuple[Vectors, Vectors]:
        """Returns the means over the ranks, and the parts of this rank's message that were not sent."""
        mean: dict[str, Tensor] = {}
        unsent: dict[str, Tensor] = {}
        for name, group in self._groups.items():
            result, names = results[name], [layer.name for layer in group.layers]
            mean.update(zip(names, result.mean, strict=True))
            if result.residual is not None:
                unsent.update(zip(names, result.residual, strict=True))
        order = list(self.controller.layers)
        complete = [name for name in order if name not in unsent]
        unsent.update(zip(complete, self.ops.zeros_like([mean[name] for name in complete]), strict=True))
        return [mean[name] for name in order], [unsent[name] for name in order]

"""One kind of message of a method: lists of tensors through the specs of their layers, with what that must remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression import Context, Dense
from hvd_accordion.compression.base import Memory
from hvd_accordion.compression.feedback import ExchangeResult, exchange
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import assignment
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.vectors import Vectors, each


@dataclass
class Channel:
    """Messages of one kind.

    Args:
        kind: part of the names of its exchanges; equal on all ranks.
        mode: "fed", with error feedback: what was not sent goes with the next; "once", compressed as it is: what was not
            sent is forgotten; "dense".
    """

    kind: str
    mode: str
    ops: Ops
    controller: Controller
    seed: int
    rank: int
    size: int
    residual: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    _groups: dict[str, assignment.Group] = field(default_factory=dict)

    def exchanges(self, vectors: Vectors) -> dict[str, Rounds[ExchangeResult]]:
        """To be run side by side; `vectors` stay as they are."""
        layers = self.controller.layers
        dense = self.mode == "dense"
        specs = dict.fromkeys(layers, Dense()) if dense else self.controller.specs()
        groups = assignment.grouped([list(layers.values())], specs, self.residual)
        self._groups = {f"{self.kind}.{group.name}": group for group in groups}
        values = dict(zip(layers, each(lambda v: v * 1, vectors), strict=True))
        return {name: self._exchange(group, values) for name, group in self._groups.items()}

    def _exchange(self, group: assignment.Group, values: Mapping[str, Tensor]) -> Rounds[ExchangeResult]:
        names = tuple(layer.name for layer in group.layers)
        mine = [values[name] for name in names]
        residual = None
        if group.has_residual:
            zeros = self.ops.zeros_like(mine)
            residual = [self.residual.get(name, zero) for name, zero in zip(names, zeros, strict=True)]
        memory = [self.memory.get(name, {}) for name in names]
        # seeds by kind and place: other random entries than another kind's, the same whatever a framework calls a variable
        places = {name: i for i, name in enumerate(self.controller.layers)}
        seeds = tuple(f"{self.kind}.{places[name]}" for name in names)
        ctx = Context(seeds, group.layers[0].dtype, self.controller.step, self.seed, self.rank, self.size)
        return exchange(group.spec, self.ops, mine, residual, memory, ctx)

    def received(self, answers: Mapping[str, ExchangeResult]) -> tuple[Vectors, Vectors]:
        """Means over the ranks, and what this rank holds unsent, zeros where that is nothing; in the layers' order."""
        mean: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name, group in self._groups.items():
            step, names = answers[name], [layer.name for layer in group.layers]
            mean.update(zip(names, step.mean, strict=True))
            self.memory.update(zip(names, step.memory, strict=True))
            if step.residual is not None:
                left.update(zip(names, step.residual, strict=True))
        if self.mode == "fed":
            self.residual.update(left)
        order = list(self.controller.layers)
        nothing = self.ops.zeros_like([mean[name] for name in order if name not in left])
        left.update(zip([name for name in order if name not in left], nothing, strict=True))
        return [mean[name] for name in order], [left[name] for name in order]

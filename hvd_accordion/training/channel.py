"""What layers keep from exchange to exchange, and each exchange with it: one for torch, TensorFlow and `optim`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression import Context
from hvd_accordion.compression.base import Memory
from hvd_accordion.compression.feedback import ExchangeResult, exchange
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy.layers import Group


@dataclass
class Channel:
    """Residuals and memory of layers.

    Args:
        seed: of everything random in compression.
        rank, size: this rank's number among the ranks that exchange.
        residual: layer name -> what this rank has not sent yet, fp32 at least. A mapping of any kind: read when an
            exchange starts, set when it ends.
        memory: layer name -> what its spec keeps, equal on all ranks; likewise.
        seed_name: what seeds depend on in place of a layer's name.
        forgets: what an exchange leaves unsent is not kept, though its result has it.
        residual_decay: what an exchange leaves unsent is multiplied by this, see `feedback.exchange`.
    """

    ops: Ops
    seed: int
    rank: int
    size: int
    residual: MutableMapping[str, Tensor] = field(default_factory=dict)
    memory: MutableMapping[str, Memory] = field(default_factory=dict)
    seed_name: Callable[[str], str] = str
    forgets: bool = False
    residual_decay: float = 1.0
    added: dict[str, Tensor] = field(default_factory=dict)  # gradients under way that residuals may hold by now

    def exchange(
        self, group: Group, gradients: Sequence[Tensor], step: Any, places: Mapping[str, Tensor] | None = None
    ) -> Rounds[ExchangeResult]:
        """The group's exchange at this step: takes residual and memory, puts back what the exchange leaves of them.

        places: layer name -> memory that its mean may take; read when the rounds are over. See `feedback.exchange`.
        """
        names = [layer.name for layer in group.layers]
        residual = self._residual(names, gradients) if group.has_residual else None
        if residual is not None and group.spec.lossy:
            self.added.update(zip(names, gradients, strict=True))
        memory = [self.memory.get(name, {}) for name in names]
        seeds = tuple(map(self.seed_name, names))
        ctx = Context(seeds, group.layers[0].dtype, step, self.seed, self.rank, self.size)
        into = None if places is None else lambda: [places.get(name) for name in names]
        result = yield from exchange(
            group.spec, self.ops, list(gradients), residual, memory, ctx, into, self.residual_decay
        )
        for name in names:
            self.added.pop(name, None)
        self.memory.update(zip(names, result.memory, strict=True))
        if result.residual is not None and not self.forgets:
            self.residual.update(zip(names, result.residual, strict=True))
        return result

    def _residual(self, names: Sequence[str], gradients: Sequence[Tensor]) -> list[Tensor]:
        found = {name: self.residual[name] for name in names if name in self.residual}
        new = [(name, grad) for name, grad in zip(names, gradients, strict=True) if name not in found]
        if new:
            zeros = self.ops.zeros_like(self.ops.upcast([grad for _, grad in new]))
            made = dict(zip((name for name, _ in new), zeros, strict=True))
            if not self.forgets:
                self.residual.update(made)
            found |= made
        return [found[name] for name in names]

    def unsent(self) -> dict[str, Tensor]:
        """The residuals, without the gradients of exchanges under way."""
        before = {name: self.ops.undo_add(self.residual[name], grad) for name, grad in self.added.items()}
        return {**self.residual, **before}

    def abandon(self) -> None:
        """Exchanges under way will not end: residuals become what they were."""
        self.residual.update({name: x for name, x in self.unsent().items() if name in self.added})
        self.added = {}

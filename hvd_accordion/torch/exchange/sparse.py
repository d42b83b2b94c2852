"""Which gradients are sparse (of `nn.Embedding(sparse=True)`), and their way: gathered as Horovod does, not compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.comm.collectives import AllGather, sent
from hvd_accordion.training.settings import Settings


class SparseLayers:
    """The layers that have had a gradient on any rank, and whether it was sparse; the same on every rank.

    Ranks ask each other at the first step, and again as long as there are layers without any gradient yet.
    """

    def __init__(self, settings: Settings, prefix: str) -> None:
        self.settings, self.prefix = settings, prefix
        self.known: dict[str, int] = {}  # sparse dimensions; 0: dense
        self.handles: dict[str, Any] = {}
        self.nbytes: dict[str, float] = {}
        self.means: dict[str, torch.Tensor] = {}
        self._asked: tuple[list[str], Any] = [], None

    @property
    def dims(self) -> dict[str, int]:
        return {name: dims for name, dims in self.known.items() if dims}

    def is_dense(self, name: str) -> bool:
        return self.known.get(name) == 0

    def ask(self, grads: Mapping[str, torch.Tensor | None]) -> None:
        """Asks all ranks about these layers: one small allreduce."""
        found = torch.tensor([self._code(grad) for grad in grads.values()], dtype=torch.int32)
        where = {"process_set": self.settings.process_set}
        self._asked = list(grads), hvd.allreduce_async(found, op=hvd.Max, name=f"{self.prefix}.dims", **where)

    def _code(self, grad: torch.Tensor | None) -> int:
        """0: there is none; 1: dense; more: sparse, 1 + its dimensions."""
        if grad is None:
            return 0
        return 1 + (grad.sparse_dim() if grad.is_sparse and not self.settings.sparse_as_dense else 0)

    @property
    def answered(self) -> bool:
        return hvd.poll(self._asked[1])

    def learn(self) -> None:
        names, handle = self._asked
        codes = hvd.synchronize(handle).tolist()
        self.known |= {name: code - 1 for name, code in zip(names, codes, strict=True) if code}

    def start(self, name: str, p: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
        """Sends the gradient off; a missing one as a sparse tensor without entries."""
        if grad is None:
            dims = self.known[name]
            indices = torch.empty((dims, 0), dtype=torch.int64, device=p.device)
            values = torch.empty((0, *p.shape[dims:]), dtype=p.dtype, device=p.device)
            grad = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=False)
        elif not grad.is_sparse:
            grad = grad.to_sparse(self.known[name])
        entries = grad._indices().nbytes + grad._values().nbytes
        op, process_set = self.settings.op, self.settings.process_set
        self.nbytes[name] = sent(AllGather, entries, process_set.size())
        self.handles[name] = hvd.sparse_allreduce_async(grad, f"{self.prefix}.{name}", op, process_set)

    def finish(self, name: str) -> tuple[torch.Tensor, float]:
        """Waits for the joined gradient; returns whether it is finite and the bytes that this rank sent."""
        self.means[name] = self.handles.pop(name)()
        return torch.isfinite(self.means[name]._values()).all(), self.nbytes.pop(name)

    def put(self, name: str, p: torch.nn.Parameter, factor: float, wanted: bool) -> None:
        """Sets the joined gradient, times a factor, where it is wanted."""
        mean = self.means.pop(name)
        if wanted:
            p.grad = mean * factor if factor != 1.0 else mean

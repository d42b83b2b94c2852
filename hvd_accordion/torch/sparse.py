"""Sparse gradients (of `nn.Embedding(sparse=True)`): gathered as Horovod does, not compressed further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.collectives import AllGather, sent


@dataclass
class SparseLayers:
    """The layers whose gradients are sparse: name -> sparse dimensions, the same on every rank."""

    dims: dict[str, int]
    prefix: str
    op: Any
    process_set: hvd.ProcessSet
    handles: dict[str, Any] = field(default_factory=dict)
    nbytes: dict[str, float] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, name: str, p: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
        """Sends the gradient off; a missing one as a sparse tensor without entries."""
        if grad is None:
            dims = self.dims[name]
            indices = torch.empty((dims, 0), dtype=torch.int64, device=p.device)
            values = torch.empty((0, *p.shape[dims:]), dtype=p.dtype, device=p.device)
            grad = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=False)
        elif not grad.is_sparse:
            raise ValueError(f"the gradient of {name} is dense but was sparse at the first step")
        entries = grad._indices().nbytes + grad._values().nbytes
        self.nbytes[name] = sent(AllGather, entries, self.process_set.size())
        self.handles[name] = hvd.sparse_allreduce_async(grad, f"{self.prefix}.{name}", self.op, self.process_set)

    def finish(self, name: str) -> tuple[torch.Tensor, float]:
        """Waits for the joined gradient; returns whether it is finite and the bytes that this rank sent."""
        self.means[name] = self.handles.pop(name)()
        return torch.isfinite(self.means[name]._values()).all(), self.nbytes.pop(name)

    def put(self, name: str, p: torch.nn.Parameter, factor: float, wanted: bool) -> None:
        """Sets the joined gradient, times a factor, where it is wanted."""
        mean = self.means.pop(name)
        if wanted:
            p.grad = mean * factor if factor != 1.0 else mean


def agree(grads: Mapping[str, torch.Tensor | None], prefix: str, settings: Any) -> SparseLayers:
    """Which gradients are sparse on any rank: one small allreduce, at the first step."""
    found = [0 if g is None or not g.is_sparse else g.sparse_dim() for g in grads.values()]
    dims = torch.tensor(found, dtype=torch.int32)
    dims = hvd.allreduce(dims, op=hvd.Max, name=f"{prefix}.dims", process_set=settings.process_set)
    chosen = {} if settings.sparse_as_dense else {n: d for n, d in zip(grads, dims.tolist(), strict=True) if d}
    return SparseLayers(chosen, prefix, settings.op, settings.process_set)

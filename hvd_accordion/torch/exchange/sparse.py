"""Sparse gradients (of `nn.Embedding(sparse=True)`): which are, and their exchange, gathered as Horovod does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvd_accordion.comm.collectives import AllGather, sent
from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.training.settings import Settings


class SparseLayers:
    """The layers that have had a gradient on any rank, and whether it was sparse; the same on every rank.

    Ranks compare at the first step, and again as long as there are layers without any gradient yet.
    """

    def __init__(self, settings: Settings, prefix: Prefix, transport: Transport) -> None:
        self.settings, self.prefix, self.transport = settings, prefix, transport
        self.known: dict[str, int] = {}  # sparse dimensions; 0: dense
        self.compared = False  # whether ranks have done so once
        self.means: dict[str, torch.Tensor] = {}
        self._gathers: dict[str, Any] = {}  # handles of values and indices
        self._nbytes: dict[str, float] = {}
        self._compared: tuple[list[str], Any] = [], None

    @property
    def dims(self) -> dict[str, int]:
        return {name: dims for name, dims in self.known.items() if dims}

    def is_dense(self, name: str) -> bool:
        return self.known.get(name) == 0

    def compare(self, grads: Mapping[str, torch.Tensor | None]) -> None:
        """Starts to compare these layers among all ranks: one small allreduce."""
        found = torch.tensor([self._code(grad) for grad in grads.values()], dtype=torch.int32)
        self._compared = list(grads), self.transport.allreduce([found], f"{self.prefix}.sparse.dims", "max")

    def _code(self, grad: torch.Tensor | None) -> int:
        """0: there is none; 1: dense; more: sparse, 1 + its dimensions."""
        if grad is None:
            return 0
        return 1 + (grad.sparse_dim() if grad.is_sparse and not self.settings.sparse_as_dense else 0)

    @property
    def answered(self) -> bool:
        return self.transport.poll(self._compared[1])

    def learn(self) -> None:
        names, handle = self._compared
        (codes,) = self.transport.wait(handle)
        self.known |= {name: code - 1 for name, code in zip(names, codes.tolist(), strict=True) if code}

    def start(self, name: str, p: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
        """Gathers the gradient; a missing one as a sparse tensor without entries."""
        if grad is None:
            dims = self.known[name]
            indices = torch.empty((dims, 0), dtype=torch.int64, device=p.device)
            values = torch.empty((0, *p.shape[dims:]), dtype=p.dtype, device=p.device)
            grad = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=False)
        elif not grad.is_sparse:
            grad = grad.to_sparse(self.known[name])
        positions, values, at = grad._indices().t().contiguous(), grad._values(), f"{self.prefix}.sparse.{name}"
        self._nbytes[name] = sent(AllGather, positions.nbytes + values.nbytes, self.transport.size)
        gather = self.transport.allgather
        self._gathers[name] = gather(values, f"{at}.values"), gather(positions, f"{at}.indices"), tuple(p.shape)

    def finish(self, name: str) -> tuple[torch.Tensor, float]:
        """Waits for the joined gradient; returns whether it is finite and the bytes that this rank sent."""
        values, positions, shape = self._gathers.pop(name)
        joined, positions = self.transport.wait(values), self.transport.wait(positions)
        if self.settings.op == self.settings.average:
            joined = joined / self.transport.size
        self.means[name] = torch.sparse_coo_tensor(positions.t(), joined, shape, check_invariants=False)
        return torch.isfinite(joined).all(), self._nbytes.pop(name)

    def put(self, name: str, p: torch.nn.Parameter, factor: float, wanted: bool) -> None:
        """Sets the joined gradient, times a factor, where it is wanted."""
        mean = self.means.pop(name)
        if wanted:
            p.grad = mean * factor if factor != 1.0 else mean

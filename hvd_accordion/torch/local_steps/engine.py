"""What one optimizer with local steps exchanges: its fragments, in order, and its model's buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hvd_accordion.comm.collectives import AllReduce, sent
from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.torch.exchange import rivals
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.exchange.micro_batches import wide
from hvd_accordion.torch.local_steps.fragment import Fragment
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import CompressionReport, LayerReport, Logger, Stats

if TYPE_CHECKING:
    from hvd_accordion.torch.local_steps.training import LocalTraining


class LocalEngine:
    """Exchanges what local steps changed.

    Args:
        fragments: never empty.
        buffers: floating-point tensors that are averaged when the first fragment is exchanged, such as a model's
            running means.
        lr: gives the learning rate of now.
        prefix: of the names of its own collectives.
        logger: on rank 0, else None.

    Attributes:
        steps: of the training, up to this optimizer's last one.
        training: set when the optimizer joins it.
    """

    training: LocalTraining

    def __init__(
        self,
        fragments: Sequence[Fragment],
        buffers: Iterable[torch.Tensor],
        lr: Callable[[], float],
        prefix: Prefix,
        transport: Transport,
        active: bool,
        logger: Logger | None,
    ) -> None:
        self.fragments, self.lr = list(fragments), lr
        self.buffers = [x for x in buffers if x.is_floating_point() and x.numel()]
        self.prefix, self.transport, self.active = prefix, transport, active
        self.logger = logger
        self.steps = 0
        self.buffer_bytes = 0.0
        self._epoch_start = Stats()
        self._compared = False
        rivals.claim(self)

    @property
    def params(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for part in self.fragments for name, p in part.params.items()}

    @property
    def controller(self) -> Controller:
        """Of the first fragment: all have the same policies."""
        return self.fragments[0].engine.controller

    @property
    def size(self) -> int:
        return self.transport.size

    completes_batch = True  # every step is an update

    def take_anchors(self) -> None:
        """Before a step: parameters that are new to the exchange are common now.

        Raises ValueError, on every rank the same, where ranks start from different parameters.
        """
        new = {i: names for i, part in enumerate(self.fragments) if (names := part.new_names())}
        if new and not self._compared and self.active:
            self._compared = True
            params = {name: self.fragments[i].params[name] for i, names in new.items() for name in names}
            require_common(params, f"{self.prefix}.start", self.transport)
        for i, names in new.items():
            self.fragments[i].take_anchor(names)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Gives the buffers their mean over the ranks."""
        if not self.buffers or self.transport.size == 1:
            return
        values = [x.to(wide(x), copy=True) for x in self.buffers]
        scales = 1.0 / self.transport.size, 1.0
        means = self.transport.wait(self.transport.allreduce(values, f"{self.prefix}.buffers", scales=scales))
        torch._foreach_copy_(self.buffers, means)
        self.buffer_bytes += sent(AllReduce, sum(x.nbytes for x in means), self.transport.size)

    def add(self, params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Policy]) -> None:
        """Takes in more parameters, the same on every rank: as part of the last fragment."""
        self.fragments[-1].add(params, policy)
        rivals.claim(self)

    def release(self) -> None:
        for part in self.fragments:
            part.engine.release()
        rivals.withdraw(self)

    # reports

    def stats(self, step: int) -> Stats:
        """Totals. Dense bytes are those of an exchange at each of the `step` steps."""
        parts = [part.engine.controller for part in self.fragments]
        exchanges = max(1, sum(c.stats.steps for c in parts))
        dense = sum(c.levels.dense_bytes for c in parts)
        return Stats(
            steps=step,
            sent_bytes=sum(c.stats.sent_bytes for c in parts) + self.buffer_bytes,
            dense_bytes=step * dense,
            exchange_seconds=sum(c.stats.exchange_seconds for c in parts),
            critical_layers=step * sum(c.stats.critical_layers for c in parts) / exchanges,
            critical_bytes=step * sum(c.stats.critical_bytes for c in parts) / exchanges,
            updates=max(c.stats.updates for c in parts),
        )

    def report(self, every: int, line: str) -> CompressionReport:
        """Bytes are those of an exchange, over the steps between two."""
        rows: list[LayerReport] = []
        for part in self.fragments:
            rows += part.engine.controller.report(part.engine.bytes_per_step())
        total = sum(row.sent_bytes for row in rows)
        shares = [row.sent_bytes / total if total else 0.0 for row in rows]
        found = (replace(row, sent_bytes=row.sent_bytes / every, share=s) for row, s in zip(rows, shares, strict=True))
        return CompressionReport(tuple(found), line)

    def log_epoch(self, epoch: int, step: int, more: Mapping[str, float]) -> None:
        """The totals of the epoch that ends."""
        now = self.stats(step)
        done, self._epoch_start = now.since(self._epoch_start), now
        if self.logger is not None:
            self.logger.log_epoch(epoch, {**done.metrics(), **more, "updates": float(done.updates)})


def require_common(params: Mapping[str, torch.Tensor], name: str, transport: Transport) -> None:
    """ValueError, on every rank the same, where parameters differ: compares the sum of their bits as integers."""
    if transport.size == 1:
        return
    sums = torch.stack([bits(p).sum(dtype=torch.int64).cpu() for p in params.values()]).tolist()
    checksums = [f"a checksum of {x}" for x in sums]
    try:
        require_equal(dict(zip(params, checksums, strict=True)), name, transport)
    except ValueError as error:
        raise ValueError(
            "local steps must start from equal parameters on all ranks: call hvd.broadcast_parameters(model.state_dict(), "
            f"root_rank=0) before the first step ({error})"
        ) from None


def bits(p: torch.Tensor) -> torch.Tensor:
    """As integers, whose sum does not depend on the order."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return p.detach().contiguous().view(whole[p.element_size()])

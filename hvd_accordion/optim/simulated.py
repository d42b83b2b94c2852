"""Runs n ranks of a method in one process on numpy arrays: for experiments, and as the reference of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hvd_accordion.comm import simulation
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops import numpy as ops
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.optim import factories
from hvd_accordion.optim.worker import Gradient, Worker
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.vectors import Vectors


class Simulated:
    """A simulated cluster whose workers share x.

    Args:
        make: builds the method from the layers, their initial specs and the number of ranks.
        x: the initial point. All arithmetic is in its dtype.
        compression: a spec, an Accordion, or a dict from glob to these. The layers' names are "0", "1", ...
        size: number of workers.
        seed: of random compression.
        steps_per_epoch: for an Accordion that counts epochs.
    """

    def __init__(
        self,
        make: factories.Make,
        x: Vectors,
        compression: Compression,
        size: int,
        seed: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        layers = [factories.layer_of(str(i), v.shape, ops.dtype(v)) for i, v in enumerate(x)]
        policy = factories.policies(compression, [layer.name for layer in layers])
        self.x, self.sent_bytes = list(x), 0.0
        self.method = factories.build(make, layers, policy, size)
        controllers = [Controller(layers, policy, size, steps_per_epoch, min_numel=1) for _ in range(size)]
        self.workers = [Worker(self.method, cast(Ops, ops), c, seed, rank, size) for rank, c in enumerate(controllers)]

    def step(self, sampled: Sequence[Gradient], full: Sequence[Gradient]) -> None:
        """Runs one round. Each worker's `sampled` and `full` return its gradients at a point (see `Worker.gradients`)."""
        rounds = [
            worker.messages(*worker.gradients(self.x, its_sampled, its_full))
            for worker, its_sampled, its_full in zip(self.workers, sampled, full, strict=True)
        ]
        results: list[dict[str, ExchangeResult]] = [{} for _ in self.workers]
        total = 0.0
        for name in rounds[0]:
            by_rank, nbytes = simulation.run([exchanges[name] for exchanges in rounds])
            total += nbytes
            for its_results, result in zip(results, by_rank, strict=True):
                its_results[name] = result
        new = [worker.receive(self.x, mine, total) for worker, mine in zip(self.workers, results, strict=True)]
        self.x, self.sent_bytes = new[0], self.sent_bytes + total

    @property
    def solution(self) -> Vectors:
        """The point that converges: y or x, depending on the method."""
        return self.workers[0].solution or self.x

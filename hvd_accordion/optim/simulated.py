"""n ranks of a method in one process, over numpy arrays: for experiments and as the oracle of the tests."""

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
    """A cluster of nodes at one x.

    Args:
        make: the method, from the layers, the specs that they start with, and the number of ranks.
        x: where it starts; all arithmetic is in its dtype.
        compression: a spec, an Accordion, or a dict from globs of the layers' names ("0", "1", ...) to them.
        size: nodes.
        seed: of everything random in compression.
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
        self.method = factories.made(make, layers, policy, size)
        controllers = [Controller(layers, policy, size, steps_per_epoch, min_numel=1) for _ in range(size)]
        self.nodes = [Worker(self.method, cast(Ops, ops), c, seed, rank, size) for rank, c in enumerate(controllers)]

    def step(self, sampled: Sequence[Gradient], full: Sequence[Gradient]) -> None:
        """A round; each rank's `sampled` and `full` give its gradients at a point (see `Node.gradients`)."""
        sides = zip(self.nodes, sampled, full, strict=True)
        rounds = [node.messages(*node.gradients(self.x, some, every)) for node, some, every in sides]
        answers: list[dict[str, ExchangeResult]] = [{} for _ in self.nodes]
        total = 0.0
        for name in rounds[0]:
            results, nbytes = simulation.run([mine[name] for mine in rounds])
            total += nbytes
            for answer, result in zip(answers, results, strict=True):
                answer[name] = result
        moved = [node.receive(self.x, answer, total) for node, answer in zip(self.nodes, answers, strict=True)]
        self.x, self.sent_bytes = moved[0], self.sent_bytes + total

    @property
    def solution(self) -> Vectors:
        return self.nodes[0].solution or self.x

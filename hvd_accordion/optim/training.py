"""What the shells of all frameworks have in common: one rank's method from its construction to its reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hvd_accordion.comm.collectives import Rounds
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.optim import factories
from hvd_accordion.optim.worker import Gradient, Share, Worker
from hvd_accordion.policy.assignment import Compression, Layer
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import CompressionReport, Logger, Stats
from hvd_accordion.training.settings import check_logger
from hvd_accordion.training.vectors import Vectors
from hvd_accordion.utils import validation

Run = Callable[
    [Mapping[str, Rounds[ExchangeResult]]], tuple[Mapping[str, ExchangeResult], float]
]  # exchanges -> answers, bytes sent


class Training:
    """A rank of a method on named layers.

    Args:
        layers: of `factories.layer_of`, in the order of the parameters.
        make: the method, see `recipes.made`.
        rank, size: its place among the ranks.
        share: gives numbers as rank 0 has them.
        steps_per_epoch, logger: as `DistributedOptimizer`'s.
    """

    def __init__(
        self,
        ops: Ops,
        layers: Sequence[Layer],
        compression: Compression,
        make: factories.Make,
        seed: int,
        rank: int,
        size: int,
        share: Share,
        steps_per_epoch: int | None,
        logger: Logger | None,
    ) -> None:
        validation.integer("seed", seed, 0)
        if steps_per_epoch is not None:
            validation.integer("steps_per_epoch", steps_per_epoch, 1)
        check_logger(logger)
        policy = factories.policies(compression, [layer.name for layer in layers])
        self.method = factories.build(make, layers, policy, size)
        if logger is not None and rank == 0:
            logger.start({"optimizer": self.method.name, "compression": str(compression), "world_size": size})
        logger = logger if rank == 0 else None
        self.controller = Controller(layers, policy, size, steps_per_epoch, logger, min_numel=1)
        self.node = Worker(self.method, ops, self.controller, seed, rank, size, share)
        self.size = size
        self._settings = {"method": repr(self.method), "compression": repr(policy), "seed": seed}
        self._settings |= {"steps_per_epoch": steps_per_epoch}

    def described(self, parameters: str) -> dict[str, str]:
        """Everything in which ranks must agree, as text. `parameters`: a digest of x and of the node's shared tensors."""
        layers = {f"parameter {i}": str(layer) for i, layer in enumerate(self.controller.layers.values())}
        settings = {key: str(value) for key, value in self._settings.items()}
        settings["step"] = str(self.controller.step)
        return {**layers, **settings, "values of the parameters (see hvd.broadcast_parameters)": parameters}

    def step(self, x: Vectors, sampled: Gradient, full: Gradient, run: Run) -> Vectors:
        """x after a round; `run` carries out its exchanges, side by side."""
        gx, gw = self.node.gradients(x, sampled, full)
        begin = time.perf_counter()
        answers, nbytes = run(self.node.messages(gx, gw))
        return self.node.receive(x, answers, nbytes, time.perf_counter() - begin)

    def end_epoch(self) -> None:
        if self.controller.end_epoch():
            self.node.decide()

    def report(self) -> CompressionReport:
        specs, layers = self.controller.specs(), self.controller.layers
        sent = {n: specs[n].bytes_per_step(x.shape, x.dtype, self.size) for n, x in layers.items()}
        return self.controller.report(sent)

    @property
    def stats(self) -> Stats:
        return self.controller.stats

    def check_closures(self, closure: Any, full_closure: Any) -> None:
        """TypeError where one is missing that the method needs."""
        if not callable(closure):
            raise TypeError(f"closure must be a function that gives the loss of the current sample, got {closure!r}")
        if self.method.reduced and not callable(full_closure):
            raise TypeError(
                "full_closure must be a function that gives the mean loss over all of this rank's data (the same as closure "
                f"where that does), for {self.method.name} takes a full gradient whenever w has moved, got {full_closure!r}"
            )


class Reports:
    """What an optimizer of any framework tells of its `Training`."""

    _training: Training
    _x: Callable[[], Vectors]  # copies of what its parameters hold
    _place: Callable[[Vectors], None]  # puts a point there

    @contextmanager
    def solution(self) -> Iterator[None]:
        """In this context the parameters hold the method's solution: y under ECLK and L-Katyusha, x under the others."""
        found = self._training.node.solution
        if found is None:
            yield
            return
        x = self._x()
        self._place(found)
        try:
            yield
        finally:
            self._place(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._training.method})"

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank."""
        self._training.end_epoch()

    def compression_report(self) -> CompressionReport:
        """Per parameter: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        return self._training.report()

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return self._training.stats

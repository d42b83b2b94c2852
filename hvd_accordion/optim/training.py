"""The framework-independent part of the optimizers: one rank's method, from construction to reports."""

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
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.policy.layers import Layer
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import CompressionReport, Logger, Stats
from hvd_accordion.training.settings import check_logger
from hvd_accordion.training.vectors import Vectors
from hvd_accordion.utils import validation

# runs exchanges concurrently; returns their results and the bytes sent
Run = Callable[[Mapping[str, Rounds[ExchangeResult]]], tuple[Mapping[str, ExchangeResult], float]]


class Training:
    """A rank of a method on named layers.

    Args:
        ops: the framework's primitives.
        layers: made by `factories.layer_of`, in the order of the parameters.
        compression: as in `ECLK`.
        make: builds the method, see `factories.build`.
        seed: of random compression.
        rank: this rank.
        size: number of ranks.
        share: broadcasts rank 0's numbers.
        steps_per_epoch: as in `DistributedOptimizer`.
        logger: as in `DistributedOptimizer`.
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
        self.worker = Worker(self.method, ops, self.controller, seed, rank, size, share)
        self.size = size
        self._settings = {"method": repr(self.method), "compression": repr(policy), "seed": seed}
        self._settings |= {"steps_per_epoch": steps_per_epoch}

    def described(self, parameters: str) -> dict[str, str]:
        """Returns as text what must be equal on all ranks.

        Args:
            parameters: a digest of x and of the worker's shared tensors.
        """
        layers = {f"parameter {i}": str(layer) for i, layer in enumerate(self.controller.layers.values())}
        settings = {key: str(value) for key, value in self._settings.items()}
        settings["step"] = str(self.controller.step)
        return {**layers, **settings, "values of the parameters (see hvd.broadcast_parameters)": parameters}

    def step(self, x: Vectors, sampled: Gradient, full: Gradient, run: Run) -> Vectors:
        """Returns x after a round. `run` carries out its exchanges."""
        gx, gw = self.worker.gradients(x, sampled, full)
        begin = time.perf_counter()
        results, nbytes = run(self.worker.messages(gx, gw))
        return self.worker.receive(x, results, nbytes, time.perf_counter() - begin)

    def end_epoch(self) -> None:
        """Ends an epoch, if `steps_per_epoch` is not given."""
        self.worker.decide(self.controller.end_epoch())

    def report(self) -> CompressionReport:
        """Returns the compression of each layer."""
        specs, layers = self.controller.specs(), self.controller.layers
        sent = {n: specs[n].bytes_per_step(x.shape, x.dtype, self.size) for n, x in layers.items()}
        return self.controller.report(sent)

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return self.controller.stats

    def check_closures(self, closure: Any, full_closure: Any) -> None:
        """Raises TypeError if a closure is missing that the method needs."""
        if not callable(closure):
            raise TypeError(f"closure must be a function that returns the loss of the current sample, got {closure!r}")
        if self.method.reduced and not callable(full_closure):
            raise TypeError(
                "full_closure must be a function that returns the mean loss over all of this rank's data (closure itself, if "
                f"it does), because {self.method.name} needs a full gradient whenever w has moved, got {full_closure!r}"
            )


class Reports:
    """Mix-in of the optimizers: reports of their `Training`."""

    _training: Training
    _x: Callable[[], Vectors]  # returns copies of the parameters
    _place: Callable[[Vectors], None]  # writes a point to the parameters

    @contextmanager
    def solution(self) -> Iterator[None]:
        """Within this context the parameters hold the method's solution: y for ECLK and L-Katyusha, otherwise x."""
        solution = self._training.worker.solution
        if solution is None:
            yield
            return
        x = self._x()
        self._place(solution)
        try:
            yield
        finally:
            self._place(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._training.method})"

    def end_epoch(self) -> None:
        """Ends an epoch. Must be called on every rank if `steps_per_epoch` is not given."""
        self._training.end_epoch()

    def compression_report(self) -> CompressionReport:
        """Returns per parameter: shape, compression, regime, bytes per step, dense bytes, share. Prints as a table."""
        return self._training.report()

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return self._training.stats

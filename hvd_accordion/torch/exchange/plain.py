"""Horovod's own DistributedOptimizer, made to count what it sends, so that it reports and logs like compressed training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.torch import configuration, horovod_takeover
from hvd_accordion.torch.exchange import rivals
from hvd_accordion.torch.horovod_takeover import Compressor
from hvd_accordion.torch.reports import STATE, Reports
from hvd_accordion.torch.transport import ProcessSet
from hvd_accordion.training import resume
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings, plain_spec


class PlainEngine:
    """Counts calls of Horovod's `synchronize`.

    A step is one with gradients of its own: not what a closure evaluates further on, nor what is averaged already.

    Args:
        spec: has the cost of what Horovod sends.
        synchronize: Horovod's.
        in_flight: whether a backward pass has run since the last exchange.
        described: gives all in which ranks must agree.
        params: name -> parameter.
    """

    completes_batch = True  # every step is an update

    def __init__(
        self,
        controller: Controller,
        spec: CompressionSpec,
        synchronize: Callable[[], None],
        in_flight: Callable[[], bool],
        process_set: ProcessSet,
        membership: Membership,
        described: Callable[[], dict[str, str]],
        params: Mapping[str, torch.nn.Parameter],
    ) -> None:
        self.controller, self.spec, self._synchronize, self._in_flight = controller, spec, synchronize, in_flight
        self.process_set, self.membership, self.described = process_set, membership, described
        self.params, self.size = params, controller.world_size
        self._sent = sum(self.bytes_per_step().values())
        self.synchronized = False  # since the last step
        self.further = False  # whether a closure's evaluations belong to a step that is counted already

    def agree(self) -> None:
        """As an Engine's."""
        rank = self.process_set.rank() if self.process_set.included() else None
        self.membership.agree(self.controller, rank, self.controller.world_size)

    def move(self) -> None:
        """As an Engine's."""
        self.synchronized = self.further = False
        self.membership.move(self.controller, self.process_set.size())
        self._sent = sum(self.bytes_per_step().values())

    def bytes_per_step(self) -> dict[str, float]:
        n = self.controller.world_size
        return {name: self.spec.bytes_per_step(x.shape, x.dtype, n) for name, x in self.controller.layers.items()}

    def synchronize(self) -> None:
        begin = time.perf_counter()
        counted = self.further or (self.synchronized and not self._in_flight())
        self._synchronize()
        self.synchronized = True
        if counted:
            self.controller.exchanged_again(self._sent, time.perf_counter() - begin)
        else:
            self.controller.decide(self.controller.after_update(self._sent, time.perf_counter() - begin))

    def end_epoch(self) -> None:
        self.controller.decide(self.controller.end_epoch())

    def release(self) -> None:
        """Another engine may take the parameters."""
        rivals.withdraw(self)


class Counted(Reports):
    """What counting adds to the class of the user's optimizer, which comes after it among the bases."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """What Horovod's `step()` calls when gradients are averaged."""
        engine: PlainEngine | None = getattr(self, "_hvd", None)  # none yet where Adasum steps
        if engine is None:
            return super().step(closure)
        engine.further = engine.synchronized

        def evaluated() -> Any:
            loss = closure()  # type: ignore[misc]
            engine.further = engine.synchronized
            return loss

        try:
            return super().step(closure and evaluated)
        finally:
            engine.synchronized = engine.further = False

    def release(self) -> None:
        horovod_takeover.release(self)
        super().release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if STATE in state_dict:
            resume.warn_of(["all that compression kept, for compression is Horovod's own"], stacklevel=3)


def plain(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    compression: type[Compressor],
    settings: Settings,
    controller: Controller,
    membership: Membership,
) -> torch.optim.Optimizer:
    """Horovod's own DistributedOptimizer, untouched, around a class that counts."""

    base = type(optimizer)
    counted: Any = type(base.__name__, (Counted, base), {"__qualname__": base.__name__, "__doc__": base.__doc__})
    shell = counted.__new__(counted)
    shell.__dict__.update(optimizer.__dict__)
    result = horovod_takeover.DistributedOptimizer(
        shell,
        list(params.items()),
        compression,
        settings.backward_passes_per_step,
        settings.op,
        settings.gradient_predivide_factor,
        groups=settings.groups or None,
        sparse_as_dense=settings.sparse_as_dense,
        process_set=settings.process_set,
    )
    in_flight = horovod_takeover.in_flight(result)
    result._hvd = PlainEngine(
        controller,
        plain_spec(compression),
        result.synchronize,
        in_flight,
        settings.process_set,
        membership,
        lambda: configuration.described(params, str(compression), settings, frozen=False),
        params,
    )
    rivals.claim(result._hvd)
    result.synchronize = result._hvd.synchronize  # Horovod's step() calls it
    return result

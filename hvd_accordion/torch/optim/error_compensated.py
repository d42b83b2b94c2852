"""ECLK and its siblings as torch optimizers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from hvd_accordion.comm.collectives import Rounds
from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops import torch as ops
from hvd_accordion.optim import factories, methods, smoothness
from hvd_accordion.optim.training import Reports, Training
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.torch.exchange.agreement import from_rank_0, require_equal
from hvd_accordion.torch.exchange.driver import Driver
from hvd_accordion.torch.optim.closure_gradients import Closure, ClosureGradients
from hvd_accordion.torch.reports import STATE
from hvd_accordion.torch.transport import ProcessSet, connect, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import Logger
from hvd_accordion.training.vectors import Vectors
from hvd_accordion.utils import validation


class ErrorCompensated(Reports, torch.optim.Optimizer):
    """A method of `optim.methods` on torch parameters.

    Args:
        make: the method, see `optim.factories`.
    """

    def __init__(
        self,
        params: Any,
        compression: Compression,
        make: factories.Make,
        seed: int,
        *,
        process_set: ProcessSet = global_process_set,
        steps_per_epoch: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        elastic.refuse(type(self).__name__, "its ranks hold parts of one sum, which a rank that leaves takes along")
        super().__init__(params, {})
        names, tensors = named(self.param_groups)
        wide = ops.upcast([p.detach() for p in tensors])
        layers = [factories.layer_of(n, p.shape, ops.dtype(p), str(p.device)) for n, p in zip(names, wide, strict=True)]
        self._prefix = Prefix(process_set)
        if not process_set.included():
            raise ValueError(
                f"process_set must include this rank, got {process_set}: only its members make the optimizer"
            )
        self._transport = connect(process_set)
        rank, size = self._transport.rank, self._transport.size
        self._oracle = ClosureGradients(tensors)
        share = self._from_rank_0 if size > 1 else list
        self._training = Training(ops, layers, compression, make, seed, rank, size, share, steps_per_epoch, logger)
        self._driver: Driver | None = None  # as long as ranks have not compared what they must have in common

    @torch.no_grad()
    def step(self, closure: Closure | None = None, full_closure: Closure | None = None) -> Any:  # type: ignore[override]
        """A round. Returns closure's loss at x.

        Args:
            closure: forward and backward on the sample of this step; is called at x, and at w again.
            full_closure: forward and backward of the mean loss over all of this rank's data, which is called where w has
                moved. The same function as `closure` where there is no sampling.

        No `zero_grad` is needed. At w dropout draws as at x, and batch normalisation's statistics stay.
        """
        training, oracle = self._training, self._oracle
        training.check_closures(closure, full_closure)
        x = self._x()
        driver = self._driver or self._compared(x)
        sampled = oracle.at(x, closure)  # type: ignore[arg-type]
        full = sampled if full_closure in (None, closure) else oracle.at(x, full_closure)

        def run(rounds: Mapping[str, Rounds[ExchangeResult]]) -> tuple[dict[str, ExchangeResult], float]:
            try:
                for name, exchange in rounds.items():
                    driver.start(name, exchange)
                done = driver.finish(True)
            except BaseException:
                driver.reset()
                raise
            return {name: step for name, (step, _) in done.items()}, sum(nbytes for _, nbytes in done.values())

        oracle.place(training.step(x, sampled, full, run))
        return oracle.loss

    def _compared(self, x: Vectors) -> Driver:
        """The driver, once all ranks are known to be alike: settings, and the values of all that they must share."""
        digest = hashlib.blake2b(digest_size=8)
        for v in [*x, *self._training.worker.shared()]:
            digest.update(v.cpu().numpy().tobytes())
        require_equal(self._training.described(digest.hexdigest()), str(self._prefix), self._transport)
        self._driver = Driver(str(self._prefix), self._transport, (1 / self._training.size, 1.0))
        return self._driver

    def _from_rank_0(self, numbers: Any) -> list[float]:
        return from_rank_0(numbers, f"{self._prefix}.norms", self._transport)

    def _x(self) -> Vectors:
        return [v.clone() for v in ops.upcast([p.detach() for p in self._oracle.params])]

    def _place(self, point: Vectors) -> None:
        self._oracle.place(point)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """RuntimeError after construction: a method is one of all its parameters."""
        if hasattr(self, "_training"):
            raise RuntimeError(f"{type(self).__name__} takes no more parameters: make a new one of all of them")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, but for x, which the parameters hold: save and load one file per rank."""
        return {**super().state_dict(), STATE: self._training.worker.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up saved state; with the parameters as they were, the next steps are the same bit for bit."""
        state_dict = dict(state_dict)
        ours = state_dict.pop(STATE, None)
        super().load_state_dict(state_dict)
        if ours is not None:
            self._training.worker.load_state_dict(ours, lambda v: v.detach().clone())
            self._driver = None  # ranks compare anew


class ECLK(methods.ECLK, ErrorCompensated):
    __doc__ = methods.ECLK.__doc__


class LKatyusha(methods.LKatyusha, ErrorCompensated):
    __doc__ = methods.LKatyusha.__doc__


class ECSGD(methods.ECSGD, ErrorCompensated):
    __doc__ = methods.ECSGD.__doc__


class ECLSVRG(methods.ECLSVRG, ErrorCompensated):
    __doc__ = methods.ECLSVRG.__doc__


class LSVRG(methods.LSVRG, ErrorCompensated):
    __doc__ = methods.LSVRG.__doc__


class EF21(methods.EF21, ErrorCompensated):
    __doc__ = methods.EF21.__doc__


def estimate_smoothness(
    closure: Closure,
    params: Any,
    iterations: int = 30,
    seed: int = 0,
    process_set: ProcessSet = global_process_set,
) -> float:
    """The smoothness constant L of the mean over the ranks of their losses: the Hessian's largest eigenvalue, at the
    parameters of now, by power iteration on differences of gradients. Every rank must call it.

    Exact where the curvature is largest there (a logistic regression at 0), else too small.

    Args:
        closure: forward and backward of the mean loss over all of this rank's data.
        params: as an optimizer's.
        iterations: at most, >= 1; two gradients each.
    """
    elastic.refuse("estimate_smoothness", "it exchanges where ranks that have just come do not")
    validation.integer("iterations", iterations, 1)
    _, tensors = named(torch.optim.SGD(params, lr=0.0).param_groups)
    oracle, prefix, transport = ClosureGradients(tensors), f"{Prefix(process_set)}.smoothness", connect(process_set)
    x = [v.clone() for v in ops.upcast([p.detach() for p in tensors])]
    local = oracle.at(x, closure)

    def gradient(point: Vectors) -> Vectors:
        own = [g.clone() for g in local(point)]
        return transport.wait(transport.allreduce(own, prefix, scales=(1.0, 1 / transport.size)))

    return smoothness.estimate(ops, x, gradient, iterations, seed)


def named(groups: list[dict[str, Any]]) -> tuple[list[str], list[torch.nn.Parameter]]:
    """Names and parameters that need gradients; parameters without a name are numbered."""
    names: list[str] = []
    tensors: list[torch.nn.Parameter] = []
    for group in groups:
        given = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(given, group["params"], strict=True):
            if p.requires_grad:
                names.append(name or str(len(tensors)))
                tensors.append(p)
    return names, tensors

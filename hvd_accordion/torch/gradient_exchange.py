"""GradientExchange: averages named tensors over the ranks, for loops without an optimizer object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, assign
from hvd_accordion.policy.auto import Advice, advice_of
from hvd_accordion.torch import transport
from hvd_accordion.torch.configuration import described, layer_of, placeholder
from hvd_accordion.torch.exchange import state
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.transport import Average, ProcessSet, Sum, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.reports import CompressionReport, Logger, Stats
from hvd_accordion.training.settings import Settings, check_logger, check_op, is_horovods, plain_spec, translated

Rate = float | Callable[[], float]


class GradientExchange:
    """Averages gradients over the ranks, compressed; lives as long as the training.

        exchange = hvd.GradientExchange(PowerSGD(4))
        grads = exchange(torch.func.grad(loss)(params, batch))     # dict of name -> tensor

    The first call fixes names, shapes and dtypes, in their order; every rank must make it at the same point, for a small
    allgather compares the ranks. What compression loses is kept per name and sent later. Means are those that a
    `DistributedOptimizer` would write into `.grad`.

    Args:
        compression: as `DistributedOptimizer`'s; None and `hvd.Compression.none` are `Dense()`, `.fp16` is `FP16()`.
        steps_per_epoch: calls in an epoch; otherwise call `end_epoch()` after each.
        learning_rate: a number, or a function that gives the rate of now: its drop makes an Accordion's layers critical.
        logger: receives on rank 0 what happens, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        op, gradient_predivide_factor, process_set: as Horovod's. `groups`: an int, as Horovod's.
        sparse_as_dense: whether sparse gradients are exchanged dense, and compressed; else they are gathered.

    Raises ValueError or TypeError for arguments out of range; at the first call, on every rank the same, where ranks are
    configured differently.
    """

    def __init__(
        self,
        compression: Compression | type = None,
        *,
        steps_per_epoch: int | None = None,
        learning_rate: Rate = 1.0,
        logger: Logger | None = None,
        seed: int = 0,
        min_compress_numel: int = MIN_NUMEL,
        op: Any = Average,
        gradient_predivide_factor: float = 1.0,
        groups: int | None = None,
        sparse_as_dense: bool = False,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        elastic.refuse("GradientExchange", "no state of hvd.elastic carries it; use a DistributedOptimizer")
        check_logger(logger)
        if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int)):
            raise TypeError(f"groups must be an int or None, for gradients have no parameters, got {groups!r}")
        self.settings = Settings(
            op,
            Average,
            process_set,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
            sparse_as_dense=sparse_as_dense,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            min_compress_numel=min_compress_numel,
        )
        horovods = compression is None or is_horovods(compression)
        self.compression = plain_spec(compression) if horovods else translated(compression)
        check_op(op, (Average, Sum), compression)
        assign(self.compression, [], strict=False)  # a value of a wrong type shows at once
        self.learning_rate, self.logger = learning_rate, logger
        self._prefix = Prefix(process_set)
        self._engine: Engine | None = None
        self._saved: Mapping[str, Any] | None = None  # state that waits for the first call

    def __call__(self, gradients: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The means over the ranks (sums, with op=Sum) under the same names, in new memory; the gradients stay.

        Args:
            gradients: name -> tensor, dense or sparse. After the first call None is a gradient of zeros.

        Raises ValueError where names, shapes, dtypes or devices are not those of the first call: before anything is sent.
        """
        engine = self._engine or self._made(gradients)
        self._check(engine, gradients)
        for name, p in engine.params.items():
            grad = gradients[name]
            p.grad = None if grad is None else grad.detach().clone()
        try:
            engine.synchronize()
            zeros = torch.zeros_like
            return {name: zeros(p) if p.grad is None else p.grad for name, p in engine.params.items()}
        finally:
            for p in engine.params.values():
                p.grad = None

    def build(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Makes the state for gradients like these, and compares the ranks; the first call does so by itself."""
        if self._engine is None:
            self._made(gradients)

    def _made(self, gradients: Mapping[str, torch.Tensor | None]) -> Engine:
        """The engine, for gradients like these."""
        missing = [name for name, grad in gradients.items() if grad is None]
        if missing:
            raise ValueError(
                f"gradients: the first call must have a tensor for every name, got None for {missing[0]!r}"
            )
        params = {name: placeholder(grad, grad.dtype) for name, grad in gradients.items() if grad is not None}
        settings, process_set = self.settings, self.settings.process_set
        layers = [layer_of(name, p) for name, p in params.items()]
        policy = assign(self.compression, list(params))
        place = transport.connect(process_set)
        if process_set.included():
            require_equal(described(params, policy, settings), str(self._prefix), place)
        controller = Controller(layers, policy, place.size, settings.steps_per_epoch, None, settings.min_compress_numel)

        def logged(size: int) -> dict[str, object]:
            return settings.logged("", self.compression, policy, size, "torch", torch.__version__)

        member = Membership(self.logger, logged, "")
        engine = Engine(params, controller, settings, self._rate, self._prefix, member)
        engine.agree()
        self._engine = engine
        if self._saved is not None:
            saved, self._saved = self._saved, None
            state.load(engine, saved)
        return engine

    def _check(self, engine: Engine, gradients: Mapping[str, torch.Tensor | None]) -> None:
        new, gone = [n for n in gradients if n not in engine.params], [n for n in engine.params if n not in gradients]
        if new or gone:
            changes = [f"{text} {', '.join(names)}" for text, names in (("new:", new), ("missing:", gone)) if names]
            raise ValueError(
                f"gradients must have the names of the first call, got others ({'; '.join(changes)}): make a new "
                "GradientExchange, or give None for a gradient that is missing"
            )
        for name, p in engine.params.items():
            grad = gradients[name]
            if grad is not None and (grad.shape, grad.dtype, grad.device) != (p.shape, p.dtype, p.device):
                raise ValueError(
                    f"the gradient of {name} must be {p.dtype} {tuple(p.shape)} on {p.device} as at the first call, "
                    f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
                )

    def _rate(self) -> float:
        return float(self.learning_rate() if callable(self.learning_rate) else self.learning_rate)

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank."""
        if self._engine is not None:
            self._engine.end_epoch()

    def compression_report(self) -> CompressionReport:
        """Per name: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        if self._engine is None:
            return CompressionReport()
        return self._engine.controller.report(self._engine.bytes_per_step())

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table.

        Raises ValueError where there is no Auto, or where it has not chosen yet.
        """
        return advice_of(self._engine)

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return Stats() if self._engine is None else self._engine.controller.stats

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, factors, regimes and counts; empty before the first call. Save one file per rank."""
        if self._engine is None:
            return {} if self._saved is None else dict(self._saved)
        return state.saved(self._engine)

    def broadcast(self, root_rank: int) -> None:
        """Gives every rank what `root_rank` shares: levels, factors, norms and counts, but no residual. After `build`."""
        engine = self._engine
        if engine is not None and engine.active and engine.size > 1:
            state.broadcast(engine, root_rank)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up saved state, before the first call or later; warns of what does not fit."""
        if self._engine is None:
            self._saved = copy.deepcopy(dict(state_dict)) or None  # the saver's tensors change meanwhile
        elif state_dict:
            state.load(self._engine, state_dict)

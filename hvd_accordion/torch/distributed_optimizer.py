"""DistributedOptimizer: Horovod's, with compression that keeps state."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor, NoneCompressor

from hvd_accordion import checks
from hvd_accordion.auto import Advice, advice_of
from hvd_accordion.batch_size import AccordionBatchSize
from hvd_accordion.controller import Controller, Logger
from hvd_accordion.naming import Prefix
from hvd_accordion.plan import MIN_NUMEL, Compression, assign
from hvd_accordion.report import CompressionReport, Stats
from hvd_accordion.settings import Settings, check_logger, check_op, groups_of, is_horovods, plain_spec, translated
from hvd_accordion.torch import state
from hvd_accordion.torch.agreement import require_equal
from hvd_accordion.torch.configuration import check_groups, described, layer_of, named, take_over
from hvd_accordion.torch.engine import Engine
from hvd_accordion.torch.plain import PlainEngine

STATE = "hvd_accordion"  # our entry in the optimizer's state_dict


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: Compression | type[Compressor] = None,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    *,
    steps_per_epoch: int | None = None,
    logger: Logger | None = None,
    seed: int = 0,
    min_compress_numel: int = MIN_NUMEL,
    batch_size: AccordionBatchSize | None = None,
) -> torch.optim.Optimizer:
    """An optimizer that averages gradients over the ranks, compressed, before it steps.

    All arguments of `horovod.torch.DistributedOptimizer` keep their meaning. Compressed exchanges overlap backward;
    `synchronize()` ends them, `step()` calls it. What compression loses is kept per parameter and sent later.
    Every rank must construct it at the same point: a small allgather compares the ranks' settings.

    Args:
        optimizer: any torch optimizer, or one that `horovod.torch.DistributedOptimizer` wrapped: it is taken over with
            its settings.
        compression: None, `hvd.Compression.none` or `.fp16`: plain Horovod; a spec (`PowerSGD(4)`, `TopK(0.01)`, ...);
            an `Accordion`; an `Auto`; or a dict from parameter-name glob to any of these, first match counts, no match is
            dense. 1-D and small tensors, and those that would not get smaller, travel dense.
        groups: as Horovod's; by default runs of layers of up to 16 MiB, in the order of backward.
        steps_per_epoch: calls of `step()` in an epoch; otherwise call `optimizer.end_epoch()` after each. An Accordion
            that counts epochs raises ValueError when it has heard of none in 10,000 steps.
        logger: told on rank 0 of what happened, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        batch_size: an `AccordionBatchSize`. `step()` stays one call a micro-batch and updates with the last of a batch; the
            others send nothing. The rate is scaled for that update alone, so that schedulers and momentum (which here
            holds gradients, not rates) see nothing of it; leave averaging of losses as it is. Micro-batches left over at
            the end of an epoch make a smaller batch: known beforehand with `steps_per_epoch`, else applied by
            `end_epoch()`, which must come before a scheduler's step. `compression=None` is `Dense()` then, exchanged by this
            package. Not with `backward_passes_per_step`, nor with an optimizer that calls its closure several times. The
            sums take as much memory as the gradients.

    The result is a `torch.optim.Optimizer` that also has `synchronize`, `skip_synchronize`,
    `set_backward_passes_per_step` (as Horovod's), `end_epoch`, `completes_batch`, `compression_report`, `advice` and `stats`.

    Raises ValueError or TypeError, on every rank the same, for arguments out of range, unknown globs, parameters without
    or with doubled names, `op=Adasum` with lossy compression, and ranks that are configured differently.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if hasattr(optimizer, "_hvd"):
        raise ValueError(
            "optimizer is a DistributedOptimizer of hvd_accordion already; pass the one that it was made from"
        )
    wrapped = take_over(optimizer)
    if wrapped is not None:
        optimizer, theirs = wrapped
        named_parameters = theirs["named_parameters"] if named_parameters is None else named_parameters
        compression = theirs["compression"] if compression is None else compression
        backward_passes_per_step, op = theirs["backward_passes_per_step"], theirs["op"]
        gradient_predivide_factor, groups = theirs["gradient_predivide_factor"], theirs["groups"]
        sparse_as_dense, process_set = theirs["sparse_as_dense"], theirs["process_set"]
    groups = groups_of(num_groups, groups)
    check_groups(groups)
    check_logger(logger)
    settings = Settings(
        op,
        hvd.Average,
        process_set,
        backward_passes_per_step,
        gradient_predivide_factor,
        groups,
        sparse_as_dense,
        steps_per_epoch,
        seed,
        min_compress_numel,
        batch_size,
    )

    params = named(named_parameters, optimizer.param_groups)
    plain = compression is None or is_horovods(compression)
    if plain and batch_size is not None:
        plain, compression = False, plain_spec(compression)
    compression = translated(compression)
    policy = assign(None if plain else compression, list(params))  # type: ignore[arg-type]
    if not plain:
        check_op(op, (hvd.Average, hvd.Sum), compression, batch_size)

    prefix = str(Prefix(process_set))
    if process_set.included():
        require_equal(described(params, policy if not plain else str(compression), settings), prefix, process_set)
    if not process_set.included() or process_set.rank() != 0:
        logger = None
    size = process_set.size() if process_set.included() else 1
    trainable = [layer_of(name, p) for name, p in params.items() if p.requires_grad]
    controller = Controller(trainable, policy, size, steps_per_epoch, logger, min_compress_numel, batch_size)
    if plain:
        result = _plain(optimizer, params, compression or NoneCompressor, settings, controller)
    else:
        result = _compressed(optimizer, params, compression, settings, controller, prefix)  # type: ignore[arg-type]
    if logger is not None:
        logger.start(settings.logged(type(result).__name__, compression, policy, size, "torch", torch.__version__))
    return result


def _plain(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    compression: type[Compressor],
    settings: Settings,
    controller: Controller,
) -> torch.optim.Optimizer:
    """Horovod's own DistributedOptimizer, untouched, made to count."""

    class Counted(_Reports, type(optimizer)):  # type: ignore[misc]
        pass

    Counted.__name__ = Counted.__qualname__ = type(optimizer).__name__
    shell = Counted.__new__(Counted)
    shell.__dict__.update(optimizer.__dict__)
    result = hvd.DistributedOptimizer(
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
    result._hvd = PlainEngine(controller, plain_spec(compression), result.synchronize)
    result.synchronize = result._hvd.synchronize  # Horovod's step() calls it
    return result


class _Reports:
    """What every DistributedOptimizer of this package can tell."""

    _hvd: Engine | PlainEngine

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank."""
        self._hvd.end_epoch()

    @property
    def completes_batch(self) -> bool:
        """Whether the `step()` of the backward pass that comes next, or has just run, updates the parameters."""
        return self._hvd.completes_batch

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        return self._hvd.controller.report(self._hvd.bytes_per_step())

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table.

        Raises ValueError where there is no Auto, or where it has not chosen yet.
        """
        return advice_of(self._hvd)

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return self._hvd.controller.stats


def _compressed(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    compression: Compression,
    settings: Settings,
    controller: Controller,
    prefix: str,
) -> torch.optim.Optimizer:
    """An object of a subclass of the optimizer's own class, with its parameters, state and hooks."""
    base = type(optimizer)

    class Distributed(_Reports, base):  # type: ignore[misc, valid-type]
        # horovod.torch.broadcast_optimizer_state (and elastic training) look at the module to know a wrapped optimizer
        # and then step its base class, past any exchange
        __module__ = hvd.DistributedOptimizer.__module__

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """The optimizer's step on the averaged gradients; a closure's gradients are averaged each time it is called.

            Where a batch is made of several micro-batches, nothing but their sums changes before the last.
            """
            if closure is not None:
                return self._step_with(closure) if self._should_synchronize else super().step(closure)
            if self._should_synchronize:
                if self._hvd.synchronized:
                    warnings.warn(
                        "optimizer.step() called without optimizer.skip_synchronize() context after "
                        "optimizer.synchronize(): the gradients are averaged already and not exchanged again.",
                        stacklevel=2,
                    )
                else:
                    self._hvd.synchronize()
            self._hvd.synchronized = False
            if self._hvd.waiting:
                refuse_scaler()
                return None
            with batch_rate(self) as scale:
                scale()
                return super().step()

        def _step_with(self, closure: Callable[[], Any]) -> Any:
            engine, calls = self._hvd, 0
            with batch_rate(self) as scale:

                def synchronized() -> Any:
                    nonlocal calls
                    calls += 1
                    if calls > 1 and engine.settings.batch_size is not None:
                        raise ValueError(
                            f"batch_size: {base.__name__} calls its closure several times in a step, but a batch's "
                            "micro-batches are at hand only once; use another optimizer"
                        )
                    with torch.enable_grad():
                        loss = closure()
                    engine.synchronize()
                    scale()
                    return loss

                if engine.due:
                    return super().step(synchronized)
                with torch.enable_grad():
                    loss = closure()
                engine.synchronize()
                return loss

        def end_epoch(self) -> None:
            """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank.

            Micro-batches that wait for others are exchanged and applied.
            """
            if self._hvd.waiting:
                self._hvd.flush()
                with batch_rate(self) as scale:
                    scale()
                    super().step()
                super().zero_grad()
            super().end_epoch()

        def synchronize(self) -> None:
            """Waits until `.grad` of every parameter is the average over the ranks.

            Before a batch is complete it only keeps the gradients: what is done to them then, such as clipping, is lost.
            """
            self._hvd.synchronize()
            self._hvd.synchronized = True

        @contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """`step()` in this context leaves the gradients as they are (after a `synchronize()` of your own)."""
            self._should_synchronize = False
            try:
                yield
            finally:
                self._should_synchronize = True

        def set_backward_passes_per_step(self, passes: int) -> None:
            """Backward passes whose gradients add up locally before they are exchanged."""
            passes = checks.integer("passes", passes, 1)
            if passes > 1 and self._hvd.settings.batch_size is not None:
                raise ValueError(f"passes must be 1 with batch_size, got {passes}")
            self._hvd.set_backward_passes_per_step(passes)
            self.backward_passes_per_step = passes

        def zero_grad(self, set_to_none: bool = True) -> None:
            if self._hvd.in_flight:
                raise AssertionError(
                    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                    "optimizer.synchronize(). This is prohibited as it can cause a race condition."
                )
            super().zero_grad(set_to_none)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            """Exchanges these parameters too, under made-up names. Every rank must add them at the same point."""
            super().add_param_group(param_group)
            i = len(self.param_groups) - 1
            more = {f"param_groups.{i}.{j}": p for j, p in enumerate(self.param_groups[i]["params"])}
            self._hvd.add(more, assign(compression, list(more), strict=False))

        def state_dict(self) -> dict[str, Any]:
            """The optimizer's, and this rank's residuals, factors, regimes and counts under "hvd_accordion"."""
            return {**super().state_dict(), STATE: state.saved(self._hvd)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Residuals are a rank's own: save and load one file per rank to resume exactly."""
            state_dict = dict(state_dict)
            ours = state_dict.pop(STATE, None)
            super().load_state_dict(state_dict)
            self._hvd.sums.clear()
            if ours is not None:
                state.load(self._hvd, ours)
            self._hvd.reset()
            self._should_synchronize = True

    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    result = Distributed.__new__(Distributed)
    result.__dict__.update(optimizer.__dict__)
    result.__dict__.pop("step", None)  # a scheduler's wrapper around the old object's step
    result._should_synchronize = True
    result.backward_passes_per_step = settings.backward_passes_per_step
    result.op, result.process_set = settings.op, settings.process_set
    itself = weakref.ref(result)  # no cycle: its hooks go as soon as the user lets go of it
    result._hvd = Engine(params, controller, settings, lambda: _learning_rate(itself()), prefix)
    return result


@contextmanager
def batch_rate(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Yields what scales the rates of all groups for the batch that was exchanged last; at the end they are the user's."""
    kept = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    engine = optimizer._hvd  # type: ignore[attr-defined]

    def scale() -> None:
        factor, engine.lr_scale = engine.lr_scale, 1.0
        if factor != 1.0:
            for group, rate in kept:
                group["lr"] = rate * factor

    try:
        yield scale
    finally:
        for group, rate in kept:
            group["lr"] = rate


def refuse_scaler() -> None:
    """ValueError where a GradScaler steps before a batch is complete: its scale may change while sums hold the old one."""
    frame: Any = sys._getframe(1)
    for _ in range(5):  # past step() itself and what schedulers wrap around it
        frame = frame.f_back if frame is not None else None
        if frame is not None and isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            raise ValueError(
                "GradScaler.step() before the batch is complete: unscale, step and update the scaler only if "
                "optimizer.completes_batch, else call optimizer.step()"
            )


def _learning_rate(optimizer: torch.optim.Optimizer | None) -> float:
    """The largest of the groups'; 1 for an optimizer without."""
    groups = optimizer.param_groups if optimizer is not None else []
    return max((float(group["lr"]) for group in groups if "lr" in group), default=1.0)

"""DistributedOptimizer: Horovod's, with compression that keeps state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, assign
from hvd_accordion.policy.auto import Auto
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.policy.local_steps import LocalSteps
from hvd_accordion.torch import transport
from hvd_accordion.torch.compressed import compressed
from hvd_accordion.torch.configuration import check_groups, described, layer_of, named
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.exchange.plain import plain
from hvd_accordion.torch.horovod_takeover import Compressor, NoneCompressor, take_over
from hvd_accordion.torch.local_steps.optimizer import local
from hvd_accordion.torch.optim.compressed_momentum import CompressedMomentum
from hvd_accordion.torch.optim.error_compensated import ErrorCompensated
from hvd_accordion.torch.transport import Average, ProcessSet, Sum, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.reports import Logger
from hvd_accordion.training.settings import (
    Settings,
    check_local,
    check_logger,
    check_op,
    groups_of,
    is_horovods,
    plain_spec,
    translated,
)

if TYPE_CHECKING:
    from hvd_accordion.torch.reports import Distributed

ELASTIC_STATE = "hvd.elastic.TorchState(model=model, optimizer=optimizer, ...)"


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: Compression | type[Compressor] = None,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    steps_per_epoch: int | None = None,
    logger: Logger | None = None,
    seed: int = 0,
    min_compress_numel: int = MIN_NUMEL,
    batch_size: AccordionBatchSize | None = None,
    uneven_inputs: bool = False,
    local_steps: LocalSteps | None = None,
    buffers: Iterable[torch.Tensor] | None = None,
) -> Distributed:
    """An optimizer that averages gradients over the ranks, compressed, before it steps.

    All arguments of `horovod.torch.DistributedOptimizer` keep their meaning. Compressed exchanges overlap backward;
    `synchronize()` ends them, `step()` calls it. What compression loses is kept per parameter and sent later.
    Every rank must construct it at the same point: a small allgather compares the ranks' settings. In an elastic job that
    is left to `hvd.elastic.TorchState`, whose `sync` must come before the first step.

    Args:
        optimizer: any torch optimizer, or one that `horovod.torch.DistributedOptimizer` wrapped: it is taken over with
            its settings.
        compression: None, `hvd.Compression.none` or `.fp16`: plain Horovod; a spec (`PowerSGD(4)`, `TopK(0.01)`, ...);
            an `Accordion`; an `Auto`; or a dict from parameter-name glob to any of these, first match counts, no match is
            dense. 1-D and small tensors, and those that would not get smaller, travel dense.
        groups: as Horovod's; by default runs of layers of up to 16 MiB, in the order of backward.
        steps_per_epoch: calls of `step()` in an epoch; otherwise call `optimizer.end_epoch()` after each. An Accordion
            that counts epochs raises ValueError when it has heard of none in 10,000 steps.
        logger: receives on rank 0 what happens, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        batch_size: an `AccordionBatchSize`. `step()` stays one call a micro-batch and updates with the last of a batch; the
            others send nothing. The rate is scaled for that update alone, so that schedulers and momentum (which here
            holds gradients, not rates) see nothing of it; leave averaging of losses as it is. Micro-batches left over at
            the end of an epoch make a smaller batch: known beforehand with `steps_per_epoch`, else applied by
            `end_epoch()`, which must come before a scheduler's step. `compression=None` is `Dense()` then, exchanged by this
            package. Not with `backward_passes_per_step`, nor with an optimizer that calls its closure several times. The
            sums take as much memory as the gradients.

        uneven_inputs: ranks may have different numbers of batches: one without calls `hvd.join()`, as under Horovod, and
            takes part in the others' exchanges with zeros until all have. `join()` and `end_epoch()` wait for all ranks
            then. Costs an allreduce of 8 bytes a rank an update; on as well with `batch_size`.
        local_steps: a `LocalSteps`: each rank steps on its own gradients, and the parameters' change is exchanged now and
            then, by `compression`, whose steps are exchanges then (a step of an Accordion's interval, of a Warmup). Start
            from equal parameters (`broadcast_parameters`). Schedules of the learning rate, clipping, accumulation and
            GradScaler act on each rank as without Horovod. Not with `batch_size`, `uneven_inputs`, an `Auto`, an `op`
            other than Average, or in an elastic job. Takes the memory of the parameters once for the common ones, once
            for residuals.
        buffers: with `local_steps`, tensors that are averaged with the parameters, such as `model.buffers()`; integers are
            left out.

    The result is a `torch.optim.Optimizer` that also has `synchronize`, `skip_synchronize`,
    `set_backward_passes_per_step` (as Horovod's), `end_epoch`, `completes_batch`, `compression_report`, `advice` and `stats`;
    with `local_steps` also `end_round` and `common_parameters`.

    Raises ValueError or TypeError, on every rank the same, for arguments out of range, unknown globs, parameters without
    or with doubled names, `op=Adasum` with lossy compression, and ranks that are configured differently.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if hasattr(optimizer, "_hvd"):
        raise ValueError(
            "optimizer is a DistributedOptimizer of hvd_accordion already; pass the one that it was made from"
        )
    if isinstance(optimizer, CompressedMomentum | ErrorCompensated):
        raise ValueError(f"optimizer must not average by itself, as {type(optimizer).__name__} does: use it as it is")
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
        Average,
        process_set,
        backward_passes_per_step,
        gradient_predivide_factor,
        groups,
        sparse_as_dense,
        steps_per_epoch,
        seed,
        min_compress_numel,
        batch_size,
        uneven_inputs,
    )
    if local_steps is not None or buffers is not None:
        return _local(optimizer, named_parameters, compression, settings, logger, local_steps, buffers)
    return _distributed(optimizer, named_parameters, compression, settings, logger)


def _local(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
    compression: Any,
    settings: Settings,
    logger: Logger | None,
    local_steps: LocalSteps | None,
    buffers: Iterable[torch.Tensor] | None,
) -> Any:
    """Checks what local steps do not work with, and makes an optimizer that takes them."""
    if not isinstance(local_steps, LocalSteps):
        if local_steps is None:
            raise ValueError("buffers must be None without local_steps: they are averaged with the parameters' change")
        raise TypeError(f"local_steps must be a LocalSteps or None, got {local_steps!r}")
    elastic.refuse("local_steps", "their common parameters do not follow a change of the ranks yet")
    spec: Any = plain_spec(compression) if compression is None or is_horovods(compression) else translated(compression)
    check_local(settings, spec)
    pairs = None if named_parameters is None else list(named_parameters)
    params = named(pairs, optimizer.param_groups)
    for name, p in params.items():
        layer_of(name, p)  # of a dtype that can be exchanged
    policy = assign(spec, list(params))
    if any(isinstance(one, Auto) or one.candidates for one in policy.values()):
        raise ValueError(
            "compression must not be an Auto with local_steps: it measures exchanges beside backward passes"
        )
    settings = replace(settings, residual_decay=local_steps.residual_decay)
    names = {id(p): name for name, p in pairs or ()}
    return local(optimizer, params, spec, policy, settings, local_steps, buffers or (), logger, names)


def _distributed(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
    compression: Any,
    settings: Settings,
    logger: Logger | None,
) -> Any:
    """Compares the ranks, and makes Horovod's own optimizer or one that compresses."""
    process_set, batch_size = settings.process_set, settings.batch_size
    elastic.check_process_set(process_set, global_process_set)
    pairs = None if named_parameters is None else list(named_parameters)  # kept: their identities stay theirs
    params = named(pairs, optimizer.param_groups)
    trainable = [layer_of(name, p) for name, p in params.items() if p.requires_grad]
    horovods = compression is None or is_horovods(compression)
    if horovods and batch_size is not None:
        horovods, compression = False, plain_spec(compression)
    compression = translated(compression)
    policy = assign(None if horovods else compression, list(params))
    if not horovods:
        check_op(settings.op, (Average, Sum), compression, batch_size)

    its_policy, prefix = policy if not horovods else str(compression), Prefix(process_set)
    if process_set.included() and not elastic.active():
        require_equal(described(params, its_policy, settings), str(prefix), transport.connect(process_set))
    size = process_set.size() if process_set.included() else 1
    controller = Controller(
        trainable, policy, size, settings.steps_per_epoch, None, settings.min_compress_numel, batch_size
    )
    its_name = type(optimizer).__name__

    def logged(size: int) -> dict[str, object]:
        return settings.logged(its_name, compression, policy, size, "torch", torch.__version__)

    member = Membership(logger, logged, ELASTIC_STATE)
    result: Any
    if horovods:
        result = plain(optimizer, params, compression or NoneCompressor, settings, controller, member)
    else:
        later = {id(p): name for name, p in pairs or ()}
        result = compressed(optimizer, params, compression, settings, controller, prefix, member, later)
    if not elastic.active():
        result._hvd.agree()
    return result

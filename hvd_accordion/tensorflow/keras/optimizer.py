"""DistributedOptimizer for Keras 3: an optimizer of the wrapped one's own class, which averages gradients first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from hvd_accordion.policy.assignment import MIN_NUMEL, Compression
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.tensorflow.exchange.variables import trainable_of
from hvd_accordion.tensorflow.internals import taken_over
from hvd_accordion.tensorflow.keras.compressed_momentum import CompressedMomentum
from hvd_accordion.tensorflow.keras.copies import Wrapping
from hvd_accordion.tensorflow.keras.distributed import Distributed, distributed
from hvd_accordion.tensorflow.keras.learning_rate import members
from hvd_accordion.tensorflow.transport import Average, ProcessSet, Sum, global_process_set
from hvd_accordion.training.reports import Logger
from hvd_accordion.training.settings import groups_of
from hvd_accordion.utils import validation


# over 60 lines: Horovod's arguments, and what they mean
def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression | type = None,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    steps_per_epoch: int | None = None,
    logger: Logger | None = None,
    seed: int = 0,
    min_compress_numel: int = MIN_NUMEL,
    batch_size: AccordionBatchSize | None = None,
) -> keras.optimizers.Optimizer:
    """An optimizer that averages gradients over the ranks, compressed, before it applies them.

    All arguments of `horovod.tensorflow.keras.DistributedOptimizer` keep their meaning. The result is of a subclass of
    the optimizer's class with its name, its state and its settings: weight decay, clipping and moving averages act on
    averaged gradients. `get_config` is the wrapped optimizer's, so that a saved model loads without Horovod, by
    `keras.models.load_model`, or with it, by `load_model`; saved with the model are this rank's residuals too, and
    `tf.train.Checkpoint` holds them.

    Args:
        optimizer: any Keras 3 optimizer. Under mixed_float16 pass a `keras.optimizers.LossScaleOptimizer`: where Keras
            puts its own around the result, a rank whose gradients overflow would skip an exchange that others wait in.
        name: of the optimizer.
        compression: None, `hvd.Compression.none` or `.fp16`: plain Horovod; a spec (`PowerSGD(4)`, `TopK(0.01)`, ...);
            an `Accordion`; or a dict from variable-path glob ("conv2d*/kernel") to any of these, first match counts, no
            match is dense. 1-D and small tensors, and those that would not get smaller, travel dense; so do
            IndexedSlices, unless `sparse_as_dense`.
        device_dense, device_sparse: where exchanges run, such as "/cpu:0".
        backward_passes_per_step: steps whose gradients add up locally before they are exchanged and applied; with
            `average_aggregated_gradients` their mean counts, else their sum.
        groups: as Horovod's; by default runs of layers of up to 16 MiB, from the last to the first.
        steps_per_epoch: not needed under `fit` with any callback of this package, nor where `end_epoch` is called. An
            Accordion that counts epochs raises ValueError when it has heard of none in 10,000 steps.
        logger: gets metrics and regimes on rank 0, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        batch_size: an `AccordionBatchSize`. A micro-batch a call, exchanged and applied with the last of a batch; the others
            only add up and count as iterations. The rate is scaled for that update alone, in the graph, whether it is a
            number or a schedule; the velocity of Keras's SGD, which contains the rate, stays as it is. Micro-batches left
            over at the end of an epoch make a smaller batch: known beforehand with `steps_per_epoch`, else applied by
            `end_epoch` (a callback's, after the validation). `compression=None` is `Dense()` then. Not with
            `backward_passes_per_step`, nor with Keras's `gradient_accumulation_steps`. The sums take as much memory as the
            gradients.

    The result also has `end_epoch`, `compression_report`, `advice`, `stats` and `register_local_var`.

    Raises ValueError or TypeError for arguments out of range; at the first step, on every rank the same, where ranks are
    configured differently.
    """
    _check(optimizer, op, average_aggregated_gradients, batch_size)
    wrapping = Wrapping(
        {
            "compression": compression,
            "sparse_as_dense": sparse_as_dense,
            "gradient_predivide_factor": gradient_predivide_factor,
            "op": op,
            "backward_passes_per_step": backward_passes_per_step,
            "groups": groups_of(num_groups, groups),
            "process_set": process_set,
            "scale_local_gradients": scale_local_gradients,
            "steps_per_epoch": steps_per_epoch,
            "logger": logger,
            "seed": seed,
            "min_compress_numel": min_compress_numel,
            "batch_size": batch_size,
        },
        average_aggregated_gradients,
        device_dense or device_sparse,
    )
    result = _wrapped(optimizer, wrapping)
    if name is not None:
        result.name = name
    if optimizer.built:
        result._extend(optimizer._trainable_variables)
    return result


def _check(optimizer: Any, op: Any, average: Any, batch_size: AccordionBatchSize | None) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
    if isinstance(optimizer, CompressedMomentum):
        raise ValueError(f"optimizer must not average by itself, as {type(optimizer).__name__} does: use it as it is")
    if isinstance(optimizer, Distributed) and not optimizer._hvd_copied:
        raise ValueError(
            "optimizer is a DistributedOptimizer of hvd_accordion already; pass the one that it was made from"
        )
    if op not in (Average, Sum):
        raise ValueError("op currently only supports Average and Sum")
    validation.boolean("average_aggregated_gradients", average)
    if batch_size is not None and any(one.gradient_accumulation_steps for one in members(optimizer)):
        raise ValueError("the optimizer's gradient_accumulation_steps must be None with batch_size")


def _wrapped(optimizer: Any, wrapping: Wrapping) -> Any:
    """An optimizer with the same state, of the distributed form of its class."""
    base = optimizer._hvd_base if isinstance(optimizer, Distributed) else type(optimizer)
    if base.__module__ == "horovod._keras":
        theirs, given = taken_over(optimizer), wrapping.arguments
        kept = {} if given["compression"] is None else {"compression": given["compression"]}
        average = wrapping.average if theirs.average is None else theirs.average
        wrapping = replace(wrapping, arguments={**given, **theirs.arguments, **kept}, average=average)
        base = base.__mro__[1]
    kind: Any = distributed(base)
    result = kind.__new__(kind)
    result.__dict__.update(optimizer.__dict__)
    result._hvd_copied = False
    result._attach(wrapping)
    return result


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer, *args: Any, local_layers: Any = None, **kwargs: Any
) -> keras.optimizers.Optimizer:
    """As `DistributedOptimizer`, but the gradients of `local_layers` stay the rank's own."""
    result = DistributedOptimizer(optimizer, *args, **kwargs)
    for v in trainable_of(local_layers):
        result.register_local_var(v)
    return result

"""Makes the optimizers that `configure_optimizers` returned exchange gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import hvd_accordion.torch as hvd
from hvd_accordion.training.settings import is_horovods, plain_spec

# what the trainer decides
NOT_THEIRS = {
    *("optimizer", "named_parameters", "compression"),
    *("backward_passes_per_step", "process_set", "steps_per_epoch"),
}
OPTIONS = [name for name in inspect.signature(hvd.DistributedOptimizer).parameters if name not in NOT_THEIRS]


def check_options(options: Mapping[str, Any]) -> None:
    """TypeError for what cannot be handed on to `DistributedOptimizer`."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}: allowed are compression, {', '.join(OPTIONS)}")


def named(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's parameters under the module's names for them."""
    known = {id(p): name for name, p in module.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            yield known.get(id(p), f"param_groups.{i}.{j}"), p


def distribute(
    optimizer: torch.optim.Optimizer,
    module: torch.nn.Module,
    compression: Any,
    options: Mapping[str, Any],
    steps_per_epoch: int | None,
) -> torch.optim.Optimizer:
    """Turns this very object into a DistributedOptimizer: schedulers, callbacks and the user's module hold it already.

    The optimizer that is returned is the same in another guise; it must live as long. Plain Horovod's compression goes
    through this package's exchange: Horovod's optimizer steps before the closure that Lightning gives it.
    """
    if compression is None or is_horovods(compression):
        compression = plain_spec(compression)
    scheduled = "step" in vars(optimizer)  # torch's schedulers wrap it, and warn where they miss their wrapper
    names = list(named(optimizer, module))
    result = hvd.DistributedOptimizer(optimizer, names, compression, steps_per_epoch=steps_per_epoch, **options)
    optimizer.__class__ = type(result)
    optimizer.__dict__ = result.__dict__
    if scheduled:
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)  # wraps it and changes nothing else
    return result

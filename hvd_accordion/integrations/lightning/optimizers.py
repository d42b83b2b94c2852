"""Turns the optimizers of `configure_optimizers` into DistributedOptimizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import hvd_accordion.torch as hvd
from hvd_accordion.training.settings import is_horovods, plain_spec

# arguments that the trainer sets
SET_BY_TRAINER = {
    *("optimizer", "named_parameters", "compression"),
    *("backward_passes_per_step", "process_set", "steps_per_epoch"),
}
NOT_YET = {"local_steps", "buffers"}  # a Trainer evaluates and saves between exchanges
OPTIONS = [
    name for name in inspect.signature(hvd.DistributedOptimizer).parameters if name not in SET_BY_TRAINER | NOT_YET
]


def check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument that `DistributedOptimizer` does not accept here."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}: allowed are compression, {', '.join(OPTIONS)}")


def named(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields the optimizer's parameters with their names in the module."""
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
    """Turns the optimizer in place into a DistributedOptimizer, because schedulers, callbacks and the module refer to it.

    Horovod's own compression also uses this package's exchange, because Horovod's optimizer synchronises before it calls
    Lightning's closure.

    Args:
        optimizer: of torch.
        module: whose parameters it has.
        compression: as in `hvd_accordion.torch.DistributedOptimizer`.
        options: further arguments of it.
        steps_per_epoch: as there.

    Returns:
        An optimizer that shares the state of `optimizer`. The caller must keep a reference to it.
    """
    if compression is None or is_horovods(compression):
        compression = plain_spec(compression)
    scheduled = "step" in vars(optimizer)  # a scheduler has wrapped it, and warns if its wrapper is missing
    names = list(named(optimizer, module))
    result = hvd.DistributedOptimizer(optimizer, names, compression, steps_per_epoch=steps_per_epoch, **options)
    optimizer.__class__ = type(result)
    optimizer.__dict__ = result.__dict__
    if scheduled:
        torch.optim.lr_scheduler.ConstantLR(
            optimizer, factor=1.0, total_iters=0
        )  # wraps `step` and leaves the rate unchanged
    return result

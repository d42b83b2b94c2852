"""Horovod's own optimizer: what this package uses of it, and what it reads of its inside, which is not public."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import DistributedOptimizer, broadcast_optimizer_state, join
from horovod.torch import size as job_size
from horovod.torch.compression import Compressor, NoneCompressor

__all__ = [
    "Compressor",
    "DistributedOptimizer",
    "NoneCompressor",
    "broadcast_optimizer_state",
    "class_of",
    "in_flight",
    "job_size",
    "join",
    "release",
    "take_over",
]


def class_of(base: type[torch.optim.Optimizer], added: type) -> type[torch.optim.Optimizer]:
    """The subclass of a user's class, under its name, with what `added` adds to it.

    `horovod.torch.broadcast_optimizer_state` (and elastic training) know a wrapped optimizer by its module, and then call
    the `step()` of its class's base, which must exchange nothing: hence a base whose `step()` goes past `added`.
    """

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        return super(added, self).step(closure)  # type: ignore[arg-type]

    own = {
        "step": added.step,  # type: ignore[attr-defined]
        "__module__": hvd.DistributedOptimizer.__module__,
        "__qualname__": base.__name__,
        "__doc__": base.__doc__,
    }
    if "zero_grad" in vars(added):

        @functools.wraps(base.zero_grad)
        def zero_grad(self: Any, *args: Any, **options: Any) -> None:
            added.zero_grad(self, *args, **options)  # type: ignore[attr-defined]

        own["zero_grad"] = zero_grad
    return type(base.__name__, (type("Unexchanged", (), {"step": step}), added, base), own)


def take_over(optimizer: Any) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    """The optimizer that Horovod's DistributedOptimizer wrapped, and its settings; None if it wrapped none."""
    if type(optimizer).__module__ != hvd.DistributedOptimizer.__module__ or not hasattr(optimizer, "_parameter_names"):
        return None
    if optimizer._handles:
        raise ValueError("optimizer is in the middle of a step: wrap it before backward() or after step()")
    theirs = {
        "named_parameters": [(name, p) for p, name in optimizer._parameter_names.items()],
        "compression": optimizer._compression,
        "backward_passes_per_step": optimizer.backward_passes_per_step,
        "op": getattr(optimizer, "op", hvd.Adasum),
        "gradient_predivide_factor": getattr(optimizer, "gradient_predivide_factor", 1.0),
        "groups": getattr(optimizer, "_groups", None),
        "sparse_as_dense": getattr(optimizer, "sparse_as_dense", False),
        "process_set": getattr(optimizer, "process_set", hvd.global_process_set),
    }
    release(optimizer)
    base: Any = type(optimizer).__bases__[0]
    inner = base.__new__(base)
    inner.__dict__.update(optimizer.__dict__)
    for own in (
        "_parameter_names",
        "_compression",
        "_handles",
        "_grad_accs",
        "_requires_update",
        "_allreduce_delay",
        "step",
    ):
        inner.__dict__.pop(own, None)
    return inner, theirs


def in_flight(optimizer: torch.optim.Optimizer) -> Callable[[], bool]:
    """A function that returns whether a backward pass has come to its hooks since its last exchange ended."""
    itself = weakref.ref(optimizer)
    return lambda: bool(itself()._handles)  # type: ignore[union-attr]


def release(optimizer: Any) -> None:
    """Its hooks live in the gradient accumulators that it keeps, and go with them; those that others keep do nothing more."""
    optimizer._grad_accs.clear()
    optimizer._allreduce_delay = dict.fromkeys(optimizer._allreduce_delay, sys.maxsize)  # backward passes to wait for

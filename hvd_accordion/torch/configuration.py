"""What a torch user hands in, made one: names of parameters, Horovod's arguments, what ranks must have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor, FP16Compressor, NoneCompressor

from hvd_accordion import checks
from hvd_accordion.accordion import Accordion
from hvd_accordion.compression import FP16, Dense
from hvd_accordion.ops import torch as ops
from hvd_accordion.plan import Layer


@dataclass(frozen=True)
class Settings:
    """What DistributedOptimizer was asked for, Horovod's arguments under Horovod's names."""

    backward_passes_per_step: int
    op: Any
    gradient_predivide_factor: float
    groups: int | list[list[torch.Tensor]] | None
    sparse_as_dense: bool
    process_set: hvd.ProcessSet
    seed: int


def layer_of(name: str, p: torch.Tensor) -> Layer:
    return Layer(name, tuple(p.shape), ops.dtype(p), str(p.device))


def named(parameters: Iterable[tuple[str, torch.nn.Parameter]] | None, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Name -> parameter for all parameters of the optimizer's groups, in their order.

    Raises ValueError where a name stands twice or a parameter has none.
    """
    if parameters is None:
        return {f"allreduce.noname.{i}.{j}": p for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
    pairs = list(parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(twice)}")
    name_of: dict[int, str] = {}
    for name, p in pairs:
        name_of.setdefault(id(p), name)
    unnamed = [
        f"param_groups[{i}]['params'][{j}] of shape {tuple(p.shape)}"
        for i, group in enumerate(groups)
        for j, p in enumerate(group["params"])
        if id(p) not in name_of
    ]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: " + ", ".join(unnamed)
        )
    return {name_of[id(p)]: p for group in groups for p in group["params"]}


def is_horovods(compression: Any) -> bool:
    return isinstance(compression, type) and issubclass(compression, Compressor)


def translated(compression: Any) -> Any:
    """A dict of globs with specs in place of Horovod's own compressors; anything else as it is."""
    specs = {NoneCompressor: Dense(), FP16Compressor: FP16(error_feedback=False)}
    if not isinstance(compression, Mapping):
        return compression
    return {glob: specs.get(policy, policy) if is_horovods(policy) else policy for glob, policy in compression.items()}


def check_groups(groups: Any) -> None:
    if groups is None:
        return
    if not isinstance(groups, list):
        checks.integer("groups", groups, 0)
        return
    members = [p for group in groups for p in group]
    if any(not isinstance(p, torch.Tensor) for p in members):
        raise ValueError("groups must consist of torch.Tensor.")
    if len({id(p) for p in members}) != len(members):
        raise ValueError("A parameter can only appear once in groups.")


def take_over(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    """The optimizer that Horovod's DistributedOptimizer wrapped, and its settings; None if it wrapped none.

    Its hooks live in the gradient accumulators that it keeps; they go when it lets go of those.
    """
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
    optimizer._grad_accs.clear()
    base = type(optimizer).__bases__[0]
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


def described(
    params: Mapping[str, torch.nn.Parameter],
    policy: Mapping[str, Any] | str,
    settings: Settings,
    steps_per_epoch: int | None,
    min_numel: int,
) -> dict[str, str]:
    """Everything in which ranks must agree, as text."""
    order = {id(p): name for name, p in params.items()}
    groups = settings.groups
    if isinstance(groups, list):
        groups = [[order.get(id(p), "?") for p in group] for group in groups]  # type: ignore[misc]
    described = {
        "versions": f"hvd_accordion {version('hvd_accordion')}, horovod {version('horovod')}, torch {torch.__version__}",
        "number of parameters": str(len(params)),
        "op": str(settings.op),
        "backward_passes_per_step": str(settings.backward_passes_per_step),
        "gradient_predivide_factor": str(settings.gradient_predivide_factor),
        "groups": str(groups),
        "sparse_as_dense": str(settings.sparse_as_dense),
        "steps_per_epoch": str(steps_per_epoch),
        "seed": str(settings.seed),
        "min_compress_numel": str(min_numel),
    }
    if isinstance(policy, str):
        described["compression"] = policy
    for i, (name, p) in enumerate(params.items()):
        kind = "" if isinstance(policy, str) else f", {policy[name]!r}"
        grad = "" if p.requires_grad else ", frozen"
        described[f"parameter {i}"] = f"{name} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}{grad}{kind}"
    return described


def logged(
    optimizer: Any,
    compression: Any,
    policy: Mapping[str, Any],
    settings: Settings,
    size: int,
    steps_per_epoch: int | None,
) -> dict[str, object]:
    """The parameters of a run, for the logger."""
    logged: dict[str, object] = {
        "optimizer": type(optimizer).__name__,
        "compression": getattr(compression, "__name__", None) or str(compression),
        "world_size": size,
        "backward_passes_per_step": settings.backward_passes_per_step,
        "steps_per_epoch": steps_per_epoch,
        "compression_seed": settings.seed,
        "version.hvd_accordion": version("hvd_accordion"),
        "version.horovod": version("horovod"),
        "version.torch": torch.__version__,
    }
    accordion = next((p for p in policy.values() if isinstance(p, Accordion)), None)
    if accordion is not None:
        logged |= {key: getattr(accordion, key) for key in ("eta", "interval", "unit", "lr_drop")}
        logged |= {"critical": str(accordion.critical), "relaxed": str(accordion.relaxed)}
    return logged

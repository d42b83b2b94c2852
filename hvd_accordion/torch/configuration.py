"""What a torch user hands in, made one: names of parameters, Horovod's arguments, what ranks must have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion import checks
from hvd_accordion.ops import torch as ops
from hvd_accordion.plan import Layer
from hvd_accordion.settings import Settings


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
    params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Any] | str, settings: Settings
) -> dict[str, str]:
    """Everything in which ranks must agree, as text."""
    order = {id(p): name for name, p in params.items()}
    groups = settings.groups
    if isinstance(groups, list):
        groups = [[order.get(id(p), "?") for p in group] for group in groups]
    described = {**settings.described("torch", torch.__version__), "groups": str(groups)}
    described["number of parameters"] = str(len(params))
    if isinstance(policy, str):
        described["compression"] = policy
    for i, (name, p) in enumerate(params.items()):
        kind = "" if isinstance(policy, str) else f", {policy[name]!r}"
        grad = "" if p.requires_grad else ", frozen"
        described[f"parameter {i}"] = f"{name} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}{grad}{kind}"
    return described

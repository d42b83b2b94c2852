"""What a torch user hands in, made one: names of parameters, Horovod's arguments, what ranks must have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hvd_accordion.compression.base import ITEMSIZE
from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.layers import Layer
from hvd_accordion.training.settings import Settings
from hvd_accordion.utils import validation


def layer_of(name: str, p: torch.Tensor) -> Layer:
    """TypeError for a parameter whose gradients no exchange can take."""
    if str(p.dtype).removeprefix("torch.") not in ITEMSIZE:
        raise TypeError(
            f"parameter {name} is of dtype {p.dtype}, but gradients can be exchanged in {', '.join(ITEMSIZE)} alone: "
            "keep a complex parameter as its real view (torch.view_as_real), or freeze it"
        )
    return Layer(name, tuple(p.shape), ops.dtype(p), str(p.device))


def placeholder(like: torch.Tensor, dtype: torch.dtype, requires_grad: bool = True) -> torch.nn.Parameter:
    """A parameter of this shape and device, in the memory of one element: what carries a gradient of no user's parameter."""
    values = torch.zeros((), dtype=dtype, device=like.device).expand(like.shape)
    return torch.nn.Parameter(values, requires_grad=requires_grad)


def named(parameters: Iterable[tuple[str, torch.nn.Parameter]] | None, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Name -> parameter for all parameters of the optimizer's groups, in their order.

    Without `parameters` they have the names that the optimizer was given them under, else made-up ones.

    Raises ValueError where a name stands twice or a parameter has none.
    """
    if parameters is None:
        pairs = [pair for i, group in enumerate(groups) for pair in of_group(f"allreduce.noname.{i}", group)]
        check_unique([name for name, _ in pairs])
        return dict(pairs)
    pairs = list(parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    check_unique([name for name, _ in pairs])
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


def of_group(prefix: str, group: Mapping[str, Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of a group under the names that torch keeps of `(name, parameter)`, else numbered."""
    names = group.get("param_names") or [f"{prefix}.{j}" for j in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def check_unique(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(twice)}")


def check_groups(groups: Any) -> None:
    if groups is None:
        return
    if not isinstance(groups, list):
        validation.integer("groups", groups, 0)
        return
    members = [p for group in groups for p in group]
    if any(not isinstance(p, torch.Tensor) for p in members):
        raise ValueError("groups must consist of torch.Tensor.")
    if len({id(p) for p in members}) != len(members):
        raise ValueError("A parameter can only appear once in groups.")


def described(
    params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Any] | str, settings: Settings, frozen: bool = True
) -> dict[str, str]:
    """Everything in which ranks must agree, as text; `frozen`: which parameters are, too."""
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
        grad = ", frozen" if frozen and not p.requires_grad else ""
        described[f"parameter {i}"] = f"{name} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}{grad}{kind}"
    return described

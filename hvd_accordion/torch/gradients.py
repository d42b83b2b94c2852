"""What an exchange takes from `.grad`, and how what it comes to is put there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.plan import Layer

Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


def kind(x: torch.Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def owned(grad: torch.Tensor) -> bool:
    """Whether the gradient has its memory for itself, as exchanges take it: contiguous, in fp32 or fp64."""
    alone = grad.untyped_storage().nbytes() == grad.nbytes and not grad._is_view()
    return alone and grad.is_contiguous() and grad.dtype in (torch.float32, torch.float64)


def taken(p: torch.Tensor, layer: Layer, planned: Kind, sparse_as_dense: bool) -> torch.Tensor:
    """The gradient, zeros where there is none, dense; ValueError where it is not what the layer was planned for."""
    if p.grad is None or not p.requires_grad:
        return torch.zeros(layer.shape, dtype=p.dtype, device=p.device)
    if p.grad.is_sparse:
        if not sparse_as_dense:
            raise ValueError(
                f"the gradient of {layer.name} is sparse but was dense at the first step: pass sparse_as_dense=True"
            )
        return p.grad.to_dense()
    if kind(p.grad) != planned:
        raise ValueError(
            f"the gradient of {layer.name} was {layer.dtype} {layer.shape} on {layer.device} when the optimizer was "
            f"made, now it is {ops.dtype(p.grad)} {tuple(p.grad.shape)} on {p.grad.device}; make a new optimizer for "
            "changed parameters"
        )
    return p.grad.detach() if owned(p.grad) else p.grad.clone(memory_format=torch.contiguous_format)


def replace(params: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
    """Puts the means where the gradients of these parameters are, or their memory there if that is no view."""
    into, new = [], []
    for p, mean in zip(params, means, strict=True):
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = mean.to(p.dtype)
        elif p.grad.is_sparse:  # sparse_as_dense
            p.grad = mean.to(p.dtype).to_sparse(p.grad.sparse_dim())
        elif p.grad.data_ptr() == mean.data_ptr():
            continue
        elif owned(p.grad):  # the values' memory may be the residual's by now
            p.grad = mean.new_empty(0).set_(mean)  # that memory, but no view of another tensor
        else:
            into.append(p.grad)
            new.append(mean)
    if into:
        torch._foreach_copy_(into, new)

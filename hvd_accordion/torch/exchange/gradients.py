"""What an exchange takes from `.grad`, and how what it comes to is put there.

A gradient is the user's: it stays the same object in the same memory, and others may lie in that memory too. So exchanges
read it when they start, or hold a loan of its memory, and averages are written when all of a step have been read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.assignment import Layer

Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


def kind(x: torch.Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def dense(grad: torch.Tensor | None, p: torch.Tensor, layer: Layer, planned: Kind) -> torch.Tensor:
    """The gradient, zeros where there is none, dense; ValueError where it is not what the layer was planned for."""
    if grad is None:
        return torch.zeros(layer.shape, dtype=p.dtype, device=p.device)
    if grad.is_sparse:  # sparse_as_dense, or the layer's first gradient was dense
        return grad.to_dense()
    if kind(grad) != planned:
        raise ValueError(
            f"the gradient of {layer.name} was {layer.dtype} {layer.shape} on {layer.device} when the optimizer was "
            f"made, now it is {ops.dtype(grad)} {tuple(grad.shape)} on {grad.device}; make a new optimizer for "
            "changed parameters"
        )
    return grad.detach()


class Loans:
    """Which memory of gradients exchanges under way may use as their own until they end."""

    def __init__(self) -> None:
        self.holders: dict[int, str] = {}  # address of a storage -> exchange
        self.names: set[str] = set()  # of the parameters

    def holder(self, grad: torch.Tensor) -> str | None:
        """The exchange that holds memory in which the gradient lies."""
        return self.holders.get(grad.untyped_storage().data_ptr())

    def lend(self, exchange: str, name: str, grad: torch.Tensor) -> torch.Tensor:
        """The gradient, or a copy where it shares its memory or does not lie there as exchanges take it."""
        storage = grad.untyped_storage()
        fitting = grad.is_contiguous() and grad.dtype in (torch.float32, torch.float64)
        if not fitting or storage.nbytes() != grad.nbytes or storage.data_ptr() in self.holders:
            return grad.clone(memory_format=torch.contiguous_format)
        self.holders[storage.data_ptr()] = exchange
        self.names.add(name)
        return grad

    def clear(self) -> None:
        self.holders, self.names = {}, set()


def places(params: Mapping[str, torch.Tensor], first: set[str]) -> dict[str, torch.Tensor]:
    """The gradients into whose memory averages may be written: of those that overlap one, those in `first` before others."""
    taken: dict[int, list[tuple[int, int]]] = {}
    found = {}
    for name in [*(n for n in params if n in first), *(n for n in params if n not in first)]:
        grad = params[name].grad
        if grad is None or grad.is_sparse:
            continue
        sides = [(size, stride) for size, stride in zip(grad.shape, grad.stride(), strict=True) if size > 1]
        begin = grad.data_ptr()
        end = begin + (1 + sum((size - 1) * stride for size, stride in sides)) * grad.element_size()
        spans = taken.setdefault(grad.untyped_storage().data_ptr(), [])
        if all(stride for _, stride in sides) and all(end <= b or e <= begin for b, e in spans):
            spans.append((begin, end))
            found[name] = grad
    return found


def kept(places: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The gradients to keep alive until the next update's are there.

    The C library gives memory that zero_grad() frees back to the system, and backward faults it in again page by page:
    a tenth of a backward pass. CUDA's allocator keeps what is freed.
    """
    return [grad for grad in places.values() if grad.is_cpu]


def room(place: torch.Tensor | None) -> torch.Tensor | None:
    """Such a place if an average can be made there."""
    fits = place is not None and place.is_contiguous() and place.dtype in (torch.float32, torch.float64)
    return place if fits else None


def put(
    params: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor]
) -> None:
    """Writes the means into the gradients; into new ones where there are none, or none that may be written."""
    into, new = [], []
    for name, mean in means.items():
        p = params[name]
        if mean.is_sparse:
            p.grad = mean
        elif p.grad is None:
            p.grad = mean.to(p.dtype, copy=True)
        elif p.grad.is_sparse:  # sparse_as_dense
            p.grad = mean.to(p.dtype).to_sparse(p.grad.sparse_dim())
        elif name not in places:
            p.grad = mean.to(p.grad.dtype, copy=True)
        elif p.grad.data_ptr() != mean.data_ptr():
            into.append(p.grad)
            new.append(mean)
    if into:
        torch._foreach_copy_(into, new)

"""Nested state with tensors in it, from one rank to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_accordion.comm.transport import Transport
from hvd_accordion.torch.exchange.agreement import broadcast_object


@dataclass(frozen=True)
class Place:
    """Where a tensor stood."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # type alone: which one is the rank's own affair


def broadcast_tree(tree: Any, root: int, name: str, transport: Transport) -> Any:
    """`tree` as the rank of number `root` has it: dicts, lists, tuples, in them tensors, and all that can be pickled.

    The tensors travel as they are, not pickled; the root gets its own back.
    """
    if transport.size == 1:
        return tree
    tensors: list[torch.Tensor] = []
    places = broadcast_object(_without(tree, tensors), root, f"{name}.tree", transport)
    if transport.rank != root:
        tensors = []
        tree = _filled(places, tensors)
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in tensors]  # any dtype goes as bytes
    handles = [transport.broadcast(x, root, f"{name}.{i}") for i, x in enumerate(flat)]
    for handle in handles:
        transport.wait(handle)  # into the new tensors: they are contiguous
    return tree


def _without(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The tree with places instead of its tensors, which are appended to the list."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return Place(tuple(tree.shape), tree.dtype, tree.device.type)
    return _mapped(tree, lambda part: _without(part, tensors))


def _filled(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The tree with new tensors in their places, which are appended to the list."""
    if isinstance(tree, Place):
        tensors.append(torch.empty(tree.shape, dtype=tree.dtype, device=tree.device))
        return tensors[-1]
    return _mapped(tree, lambda part: _filled(part, tensors))


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if type(tree) is dict:
        return {key: change(part) for key, part in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(change(part) for part in tree)
    return tree

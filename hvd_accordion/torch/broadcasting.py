"""Nested state with tensors in it, from one rank to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch


@dataclass(frozen=True)
class Place:
    """Where a tensor stood."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # type alone: which one is the rank's own affair


def broadcast_tree(tree: Any, root_rank: int, name: str, process_set: hvd.ProcessSet) -> Any:
    """`tree` as `root_rank` has it: dicts, lists, tuples and, in them, tensors and whatever else can be pickled.

    The tensors travel as they are, not pickled; the root gets its own back.
    """
    if process_set.size() == 1:
        return tree
    tensors: list[torch.Tensor] = []
    places = hvd.broadcast_object(_without(tree, tensors), root_rank, f"{name}.tree", process_set)
    if hvd.rank() != root_rank:
        tensors = []
        tree = _filled(places, tensors)
    sent = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in tensors]  # any dtype goes as bytes
    handles = [hvd.broadcast_async_(x, root_rank, f"{name}.{i}", process_set) for i, x in enumerate(sent)]
    for handle in handles:
        hvd.synchronize(handle)
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

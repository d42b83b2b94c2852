"""Calls at the end of a backward pass through a parameter, where Horovod has its own."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from hvd_accordion.torch.exchange import rivals


class Hooks:
    """Of one engine, whose `on_gradient(name)` they call. They go with it, or when they are released.

    They sit at the nodes that accumulate gradients: hooks of a parameter itself, whenever they are added, have run by then.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._kept: dict[str, tuple[Any, Any]] = {}  # node, which lives as long as somebody holds it, and handle
        weakref.finalize(engine, _remove, self._kept)

    def add(self, name: str, p: torch.Tensor) -> None:
        """If the parameter has none yet."""
        if name not in self._kept:
            node = torch.autograd.graph.get_gradient_edge(p).node
            self._kept[name] = node, node.register_hook(_hook(self._engine, name, id(p)))

    def release(self) -> None:
        _remove(self._kept)


def _hook(engine: weakref.ref[Any], name: str, p: int) -> Any:
    def hook(*_: Any) -> None:
        rivals.check(p, name)  # before this holds the engine
        alive = engine()
        if alive is not None:
            alive.on_gradient(name)

    return hook


def _remove(kept: dict[str, tuple[Any, Any]]) -> None:
    for _, handle in kept.values():
        handle.remove()
    kept.clear()

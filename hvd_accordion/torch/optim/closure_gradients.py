"""Gradients of a closure at points of a method's choice, the same sample at each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from hvd_accordion.ops import torch as ops
from hvd_accordion.training.vectors import Vectors

Closure = Callable[[], torch.Tensor]


class ClosureGradients:
    """Of parameters, which are put back to x by `place`."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.params: list[torch.Tensor] = list(params)
        self.loss: Any = None  # of the closure at x

    def place(self, point: Vectors) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.params, point)

    def gradient(self, closure: Closure) -> Vectors:
        """Of this rank's loss, where the parameters are; zeros where there is none."""
        for p in self.params:
            p.grad = None
        with torch.enable_grad():
            self.loss = closure()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.params]
        for p in self.params:
            p.grad = None
        return ops.upcast([g.to_dense() if g.is_sparse else g for g in found])

    def at(self, x: Vectors, closure: Closure) -> Callable[[Vectors], Vectors]:
        """The gradient of a closure as a function of the point.

        At x it is an ordinary pass; at another point dropout draws the same masks as at x, and batch normalisation's
        running statistics are left as they were.
        """
        states: list[Any] = []

        def gradient(point: Vectors) -> Vectors:
            if point is x:
                states[:] = generators(self.params)
                return self.gradient(closure)
            if states:
                restore(states)
            loss = self.loss
            try:
                self.place(point)
                with frozen_statistics():
                    return self.gradient(closure)
            finally:
                self.place(x)
                self.loss = loss

        return gradient


def generators(params: Sequence[torch.Tensor]) -> list[tuple[Any, torch.Tensor]]:
    """The states of the global generators that a pass over these parameters may draw from."""
    devices = {p.device for p in params if p.device.type == "cuda"}
    states: list[tuple[Any, torch.Tensor]] = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return [*states, (None, torch.get_rng_state())]


def restore(states: Sequence[tuple[Any, torch.Tensor]]) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Batch normalisation in here leaves its running statistics as they were."""
    kept: dict[torch.Tensor, torch.Tensor] = {}

    def keep(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, _NormBase) and module.training:
            for buffer in module.buffers(recurse=False):
                kept.setdefault(buffer, buffer.clone())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, value in kept.items():
                buffer.copy_(value)

"""The gradients that this rank has for an update: of one backward pass, or of several micro-batches added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.layers import Layer

Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)


class MicroBatches:
    """Counts backward passes and micro-batches, and gives the update's gradients.

    Sums stand apart from the gradients, which are the user's to zero and to clip after every micro-batch. Half-precision
    gradients are added up, and divided, in fp32.

    Attributes:
        count: micro-batches in the sums.
        expected: micro-batches of the update to come.
        passes_per_step: backward passes whose gradients torch adds up in `.grad`.
        divisor: of the sum of a rank's micro-batches, so that the mean over the ranks is near to that of all of them.
        own: whether a gradient in `.grad` belongs to the update, or only what is in the sums.
    """

    def __init__(self, params: Mapping[str, torch.nn.Parameter], passes_per_step: int) -> None:
        self.params, self.passes_per_step = params, passes_per_step
        self.count, self.expected, self.own = 0, 1, True
        self.divisor: float = 1
        self.sums: dict[str, torch.Tensor] = {}
        self._passes: dict[str, int] = {}  # yet to come, of each parameter

    def begin(self) -> None:
        """What comes now are gradients of another update."""
        self.divisor, self.own = self.expected, True

    def resize(self, micro_batches: int) -> None:
        """So many make the update to come."""
        self.expected = self.divisor = micro_batches

    def expect(self, names: Iterable[str]) -> None:
        """Backward passes through these parameters, if they are new."""
        self._passes = {**dict.fromkeys(names, self.passes_per_step), **self._passes}

    def restart(self) -> None:
        """Backward passes are counted from zero."""
        self._passes = dict.fromkeys(self._passes, self.passes_per_step)

    def set_passes_per_step(self, passes: int) -> None:
        self.passes_per_step = passes
        self.restart()

    def arrived(self, name: str) -> bool:
        """A backward pass has added to the parameter's gradient. Returns whether it was the last."""
        if self._passes[name] <= 0:
            raise AssertionError(TOO_MANY_PASSES)
        self._passes[name] -= 1
        return self._passes[name] == 0

    @torch.no_grad()
    def add(self) -> None:
        """Adds the gradients of a micro-batch to the sums."""
        for name, p in self.params.items():
            if p.grad is None or not p.requires_grad:
                continue
            if name in self.sums:
                self.sums[name] += p.grad
            else:
                self.sums[name] = p.grad.detach().to(wide(p.grad), copy=True)
        self.count += 1

    def held(self, name: str) -> torch.Tensor | None:
        """The sum of a layer, or its gradient; None where there is neither."""
        return self.sums[name] if name in self.sums else self.params[name].grad if self.own else None

    @torch.no_grad()
    def take(self, name: str) -> torch.Tensor | None:
        """The update's gradient, (sum + gradient) / divisor; None where there is neither. Gives up the sum."""
        p = self.params[name]
        last, total, divisor = p.grad if self.own else None, self.sums.pop(name, None), self.divisor
        if total is None:
            return last if last is None or divisor == 1 else last / divisor
        if last is not None:
            total = total + last if last.is_sparse or total.is_sparse else total.add_(last)
        return (total / divisor if total.is_sparse else total.div_(divisor)).to(p.dtype)

    def take_dense(self, layers: Iterable[Layer], kinds: Mapping[str, Kind]) -> list[torch.Tensor]:
        """The same of layers that are planned as dense; ValueError where a gradient is not of the kind planned."""
        return [densified(self.take(x.name), self.params[x.name], x, kinds[x.name]) for x in layers]

    def clear(self) -> None:
        self.count, self.sums = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self.sums = {name: x.detach().to(self.params[name].device, copy=True) for name, x in state["sums"].items()}


def wide(grad: torch.Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def kind(x: torch.Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def densified(grad: torch.Tensor | None, p: torch.Tensor, layer: Layer, planned: Kind) -> torch.Tensor:
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

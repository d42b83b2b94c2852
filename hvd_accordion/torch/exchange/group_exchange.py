"""Exchanges of groups of dense gradients, from this rank's gradients to means in `.grad`.

A gradient is the user's: it stays the same object in the same memory, and others may lie in that memory too. So exchanges
read it when they start, or hold a loan of its memory, and means are written when all of a step have been read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.policy.layers import Group
from hvd_accordion.torch.exchange.driver import Driver
from hvd_accordion.training.channel import Channel


class GroupExchange:
    """Starts exchanges while backward runs, and ends all of them together.

    Args:
        channel: residuals and memory of the layers.
        driver: carries the exchanges out.
    """

    def __init__(self, params: Mapping[str, torch.nn.Parameter], channel: Channel, driver: Driver) -> None:
        self.params, self.channel, self.driver = params, channel, driver
        self.loans = Loans()
        self.places: dict[str, torch.Tensor] = {}  # of an update, known when all of its gradients are taken
        self.room: dict[str, torch.Tensor] = {}  # those of them in which a mean can be made
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def start(self, group: Group, grads: Sequence[torch.Tensor], step: int) -> None:
        """Starts the exchange of a group's gradients, which are only read, or lent to it."""
        names = [layer.name for layer in group.layers]
        for grad in grads:
            holder = self.loans.holder(grad)
            if holder not in (None, group.name):  # which may average in that memory: then it holds the mean
                self.driver.wait(holder)
        if not group.has_residual:
            grads = [self.loans.lend(group.name, name, grad) for name, grad in zip(names, grads, strict=True)]
        self.driver.start(group.name, self.channel.exchange(group, grads, step, self.room))

    def finish(
        self, check_finite: bool, flags: Sequence[torch.Tensor], writes: bool
    ) -> dict[str, tuple[ExchangeResult, float]]:
        """Group name -> result and bytes sent, when all exchanges have ended. Args: see `Driver.finish`.

        writes: whether means will be written into `.grad`, so that they may be made there.
        """
        self.prepare(writes)
        return self.driver.finish(check_finite, flags)

    def prepare(self, writes: bool = True) -> None:
        """All gradients are taken: finds the memory that means may be written to."""
        self.places = places_of(self.params, self.loans.names) if writes else {}
        self.room.update((name, x) for name, x in self.places.items() if is_room(x))
        self.kept = on_cpu(self.places)

    def write(self, means: Mapping[str, torch.Tensor]) -> None:
        """Writes means into `.grad`."""
        put(self.params, self.places, means)

    def reset(self) -> None:
        """Exchanges that are under way will not end."""
        self.driver.reset()
        self.channel.abandon()
        self.loans.clear()
        self.places = {}
        self.room.clear()


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


def places_of(params: Mapping[str, torch.Tensor], first: set[str]) -> dict[str, torch.Tensor]:
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


def on_cpu(places: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The gradients to keep alive until the next update's are there.

    The C library gives memory that zero_grad() frees back to the system, and backward faults it in again page by page:
    a tenth of a backward pass. CUDA's allocator keeps what is freed.
    """
    return [grad for grad in places.values() if grad.is_cpu]


def is_room(place: torch.Tensor) -> bool:
    """Whether a mean can be made there."""
    return place.is_contiguous() and place.dtype in (torch.float32, torch.float64)


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

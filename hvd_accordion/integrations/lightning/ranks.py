"""Lightning's collectives by Horovod's: values, tensors, a module's weights, errors that all ranks raise."""

from __future__ import annotations

from typing import Any

import torch

import hvd_accordion.torch as hvd

PREFIX = "hvd_accordion.lightning"
OPS = {"mean": hvd.Average, "avg": hvd.Average, "sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max, "product": hvd.Product}
# types that Horovod cannot send, as types of the same size that it can
SENT_AS = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}
# Lightning validates in inference mode; Horovod's thread is not in it, and cannot write into tensors that are made there
ordinary = torch.inference_mode(False)


def start() -> None:
    """Horovod, where the script has not started it."""
    if not hvd.is_initialized():
        hvd.init()


@ordinary
def reduced(tensor: torch.Tensor, op: Any) -> torch.Tensor:
    """The mean, sum, minimum, maximum or product over the ranks. The mean of integers is a float.

    Raises ValueError for another operation.
    """
    name = str(op if op is not None else "mean").rpartition(".")[2].lower()
    if name not in OPS:
        raise ValueError(f"reduce_op must be one of {', '.join(OPS)}, got {op!r}")
    if hvd.size() == 1:
        return tensor
    mean = OPS[name] == hvd.Average
    wide = taken(tensor)
    if wide.dtype == torch.bool:
        wide = wide.int()
    elif wide.dtype in (torch.float16, torch.bfloat16):
        wide = wide.float()
    whole = hvd.allreduce(wide.contiguous(), op=hvd.Sum if mean else OPS[name], name=f"{PREFIX}.reduce")
    if mean:
        whole = whole / hvd.size()
    return whole.to(tensor.dtype) if tensor.is_floating_point() else whole


def stacked(tensor: torch.Tensor, differentiable: bool) -> torch.Tensor:
    """The ranks' tensors, all of one shape, as one of shape (size, *shape)."""
    if hvd.size() == 1:
        return tensor
    return Stack.apply(tensor) if differentiable else torch.stack(gathered(tensor))


class Stack(torch.autograd.Function):
    """Its gradient is the sum of the ranks', as torch.distributed has it; that of Horovod's allgather is their mean."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(gathered(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return reduced(grad, "sum")[hvd.rank()]


@ordinary
def gathered(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The ranks' tensors, of any shapes, in the order of the ranks."""
    refuse_group(group)
    tensor = taken(tensor)
    shapes = hvd.allgather_object(tuple(tensor.shape), name=f"{PREFIX}.shapes")
    counts = [torch.Size(shape).numel() for shape in shapes]
    if not any(counts):
        return [tensor.new_empty(shape) for shape in shapes]
    flat = sendable(tensor.contiguous()).reshape(-1)
    whole = hvd.allgather(flat, name=f"{PREFIX}.gather").view(tensor.dtype)
    return [part.reshape(shape) for part, shape in zip(whole.split(counts), shapes, strict=True)]


def refuse_group(group: Any) -> None:
    if group is not None:
        raise ValueError(f"group must be None, all ranks, for there is no torch.distributed here; got {group!r}")


def taken(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def sendable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a type that Horovod can send."""
    return tensor.view(SENT_AS.get(tensor.dtype, tensor.dtype))


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if hvd.size() == 1:
        return
    pending = []
    for kind in (module.named_parameters(), module.named_buffers()):
        for name, tensor in kind:
            if tensor.numel():
                sent = sendable(tensor.detach().contiguous())
                handle = hvd.broadcast_async_(sent, 0, name=f"{PREFIX}.module.{name}")
                pending.append((handle, sent, tensor))
    for handle, sent, tensor in pending:
        hvd.synchronize(handle)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent.view(tensor.dtype))


@ordinary
def everywhere(value: Any, what: str) -> list[Any]:
    """A small object of each rank, on all ranks."""
    return hvd.allgather_object(value, name=f"{PREFIX}.{what}") if hvd.size() > 1 else [value]


@ordinary
def from_rank(value: Any, root: int = 0) -> Any:
    """The root's object, on all ranks."""
    return hvd.broadcast_object(value, root, name=f"{PREFIX}.broadcast") if hvd.size() > 1 else value

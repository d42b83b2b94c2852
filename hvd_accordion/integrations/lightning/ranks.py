"""Lightning's collectives on Horovod: objects, tensors, a module's weights."""

from __future__ import annotations

from typing import Any

import torch

import hvd_accordion.torch as hvd

PREFIX = "hvd_accordion.lightning"
OPS = {"mean": hvd.Average, "avg": hvd.Average, "sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max, "product": hvd.Product}
# dtypes that Horovod cannot send, and dtypes of equal size that it can
SENT_AS = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}
# Lightning validates in inference mode, but Horovod's thread cannot write to tensors created in it
outside_inference_mode = torch.inference_mode(False)


def start() -> None:
    """Initialises Horovod if the script has not done so."""
    if not hvd.is_initialized():
        hvd.init()


@outside_inference_mode
def reduce(tensor: torch.Tensor, op: Any) -> torch.Tensor:
    """Returns the mean, sum, minimum, maximum or product over the ranks. The mean of integers is a float.

    Raises:
        ValueError: another operation is given.
    """
    name = str(op if op is not None else "mean").rpartition(".")[2].lower()
    if name not in OPS:
        raise ValueError(f"reduce_op must be one of {', '.join(OPS)}, got {op!r}")
    if hvd.size() == 1:
        return tensor
    mean = OPS[name] == hvd.Average
    wide = detached(tensor)
    if wide.dtype == torch.bool:
        wide = wide.int()
    elif wide.dtype in (torch.float16, torch.bfloat16):
        wide = wide.float()
    result = hvd.allreduce(wide.contiguous(), op=hvd.Sum if mean else OPS[name], name=f"{PREFIX}.reduce")
    if mean:
        result = result / hvd.size()
    return result.to(tensor.dtype) if tensor.is_floating_point() else result


def stack(tensor: torch.Tensor, differentiable: bool) -> torch.Tensor:
    """Stacks the ranks' tensors of equal shape to one of shape `(size, *shape)`."""
    if hvd.size() == 1:
        return tensor
    return Stack.apply(tensor) if differentiable else torch.stack(gather(tensor))  # type: ignore[no-untyped-call]


class Stack(torch.autograd.Function):
    """Stacks with the gradient of torch.distributed, the sum over the ranks. That of Horovod's allgather is the mean."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(gather(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return reduce(grad, "sum")[hvd.rank()]


@outside_inference_mode
def gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Returns the ranks' tensors of any shapes, in rank order."""
    refuse_group(group)
    tensor = detached(tensor)
    shapes = hvd.allgather_object(tuple(tensor.shape), name=f"{PREFIX}.shapes")
    counts = [torch.Size(shape).numel() for shape in shapes]
    if not any(counts):
        return [tensor.new_empty(shape) for shape in shapes]
    flat = sendable(tensor.contiguous()).reshape(-1)
    joined = hvd.allgather(flat, name=f"{PREFIX}.gather").view(tensor.dtype)
    return [part.reshape(shape) for part, shape in zip(torch.split(joined, counts), shapes, strict=True)]


def refuse_group(group: Any) -> None:
    """Raises ValueError for a process group of torch.distributed."""
    if group is not None:
        raise ValueError(f"group must be None (all ranks), because torch.distributed is not used, got {group!r}")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor without its graph, outside inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def sendable(tensor: torch.Tensor) -> torch.Tensor:
    """Views the tensor as a dtype that Horovod can send."""
    return tensor.view(SENT_AS.get(tensor.dtype, tensor.dtype))


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Broadcasts the parameters and buffers of rank 0."""
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


@outside_inference_mode
def gather_object(value: Any, what: str) -> list[Any]:
    """Returns the objects of all ranks, in rank order."""
    return hvd.allgather_object(value, name=f"{PREFIX}.{what}") if hvd.size() > 1 else [value]


@outside_inference_mode
def broadcast_object(value: Any, root: int = 0) -> Any:
    """Returns the object of the root rank."""
    return hvd.broadcast_object(value, root, name=f"{PREFIX}.broadcast") if hvd.size() > 1 else value

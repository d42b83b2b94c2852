"""The training modes that are compared. Only the processes of a mode import its libraries."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Mode:
    name: str
    make: Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]  # returns the module to call and its optimizer
    horovod: bool = True  # started by mpirun, otherwise directly with torch.distributed's variables
    warmup: int = 3  # steps before the steady state
    adapts: bool = False  # to the link: restarted for each link
    checkout: str = ""  # where the package is imported from, instead of its installation


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def alone(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, sgd(net)


def plain(compression: str) -> Callable[[nn.Module], Any]:
    def make(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        import horovod.torch as hvd

        wrapped = hvd.DistributedOptimizer(
            sgd(net), net.named_parameters(), compression=getattr(hvd.Compression, compression)
        )
        return net, wrapped

    return make


def ours(spec: Callable[[Any], Any], **arguments: Any) -> Callable[[nn.Module], Any]:
    """`spec` builds the compression from the package."""

    def make(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        import hvd_accordion
        import hvd_accordion.torch as hvd

        compression = spec(hvd_accordion)
        return net, hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=compression, **arguments)

    return make


def ddp(hook: str = "") -> Callable[[nn.Module], Any]:
    def make(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        # Horovod doesn't broadcast the statistics of batch normalisation before each step either
        wrapped = DistributedDataParallel(net, broadcast_buffers=False)
        if hook == "bf16":
            # as a lambda, because DDP refuses the hook by name without a GPU, although gloo can add bf16
            wrapped.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
        elif hook == "powerSGD":
            # 2: the earliest start allowed with error feedback
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
            wrapped.register_comm_hook(state, in_order(powerSGD_hook.powerSGD_hook))
        return wrapped, sgd(net)

    return make


def in_order(hook: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Serialises a hook: it processes one bucket at a time.

    PowerSGD's starts its second and third allreduce in callbacks; over gloo those of two buckets may come in another
    order on another rank, and then the processes abort ("Received data size doesn't match expected size").
    """
    before = None

    def one(state, bucket):  # DDP accepts only its own classes as annotations
        nonlocal before
        if before:
            before.wait()
        before = hook(state, bucket)
        return before

    return one


BEFORE = ", before"  # suffix of modes that run another checkout's package
ALONE, HOROVOD, DDP_POWERSGD = "compute alone", "Horovod", "DDP powerSGD(4)"

MODES = {
    mode.name: mode
    for mode in (
        Mode(ALONE, alone, horovod=False),
        Mode(HOROVOD, plain("none")),
        Mode("Horovod fp16", plain("fp16")),
        Mode("DDP", ddp(), horovod=False),
        Mode("DDP bf16", ddp("bf16"), horovod=False),
        Mode(DDP_POWERSGD, ddp("powerSGD"), horovod=False, warmup=4),  # two of them are dense
        Mode("None", ours(lambda package: None)),
        Mode("PowerSGD(4)", ours(lambda package: package.PowerSGD(4))),
        Mode("Accordion()", ours(lambda package: package.Accordion(interval=1), steps_per_epoch=1000)),
        Mode("TopK(0.01)", ours(lambda package: package.TopK(0.01))),
        Mode("QSGD(7)", ours(lambda package: package.QSGD(7))),
        Mode("Auto()", ours(lambda package: package.Auto()), warmup=14, adapts=True),
    )
}

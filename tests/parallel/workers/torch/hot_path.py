"""Between the backward hooks and the return of step() nothing waits for the device."""

import functools
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hvd_accordion.ops.torch
import hvd_accordion.torch as hvd
from hvd_accordion import QSGD, EFSignSGD, LocalSteps, PowerSGD, TopK
from tests.parallel.workers.torch.common import SPECS, loss_of, model, sgd, train

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "allclose")

# NumPy and lists read a tensor's memory without an operation that a dispatch mode sees
READS = ("numpy", "tolist", "__array__")


class NoWaiting(TorchDispatchMode):
    """Fails on reads of scalars, on shapes that depend on data and on copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError("an index by mask waits for the device")
        if name in ("_to_copy", "copy_") and (kwargs or {}).get("device") is not None:
            source = args[0].device
            assert torch.device(kwargs["device"]) == source, f"{name} from {source} to {kwargs['device']}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait", [lambda x: x.item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.to(device="meta")]
)
def test_the_check_can_fail(wait):
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(1))


@pytest.mark.parametrize("name", SPECS)
def test_no_wait_in_the_hot_path(name, monkeypatch):
    # what follows is the path of a GPU, which this machine need not have
    monkeypatch.setattr(hvd_accordion.ops.torch, "is_on_cpu", lambda x: False)
    net = model()
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=SPECS[name], steps_per_epoch=1000
    )
    train(net, optimizer, range(5))  # the first step settles what is sparse; windows may end at 2 and 4
    for step in (5, 6):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        if optimizer._hvd.controller.step % 2 == 1:  # every window of SPECS ends at an even step
            loss.backward()
            optimizer.step()
            continue
        with NoWaiting(), monkeypatch.context() as patch:
            for read in READS:
                patch.setattr(torch.Tensor, read, refuse(read))
            loss.backward()
            optimizer.step()


LOCAL = {
    "signs": (EFSignSGD(), LocalSteps(2)),
    "fragments": (TopK(0.05), LocalSteps(2, fragments=2)),
    "delay": (PowerSGD(2), LocalSteps(3, delay=1)),
    "outer": (QSGD(1), LocalSteps(2, functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True))),
}


@pytest.mark.parametrize("name", LOCAL)
def test_no_wait_in_local_steps_and_their_exchange(name, monkeypatch):
    monkeypatch.setattr(hvd_accordion.ops.torch, "is_on_cpu", lambda x: False)
    compression, local = LOCAL[name]
    net = model()
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=compression, local_steps=local, buffers=net.buffers()
    )
    train(net, optimizer, range(6))  # the first step compares the ranks' parameters
    with NoWaiting(), monkeypatch.context() as patch:
        for read in READS:
            patch.setattr(torch.Tensor, read, refuse(read))
        train(net, optimizer, range(6, 12))


def refuse(name):
    real = getattr(torch.Tensor, name)

    def read(*args, **kwargs):
        if sys._getframe(1).f_code.co_name != "from_rank_0":  # whose numbers never were on the device
            raise AssertionError(f"Tensor.{name} waits for the device")
        return real(*args, **kwargs)

    return read

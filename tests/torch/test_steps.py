"""What counts as a step, what rate it is made at, and what an optimizer refuses: one rank."""

import copy
import inspect
import pickle

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Dense, PowerSGD, TopK


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


BOTH = pytest.mark.parametrize("compression", [None, PowerSGD(2)], ids=str)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.Tanh(), torch.nn.Linear(50, 40))


def wrapped(compression, kind=torch.optim.SGD, batch_size=None, steps_per_epoch=None, **options):
    net = network()
    optimizer = kind(net.parameters(), **{"lr": 0.1, **options})
    options = {"compression": compression, "batch_size": batch_size, "steps_per_epoch": steps_per_epoch}
    return net, hvd.DistributedOptimizer(optimizer, net.named_parameters(), **options)


def backward(net, step=0):
    x = torch.randn(8, 60, generator=torch.Generator().manual_seed(step))
    loss = net(x).square().mean()
    loss.backward()
    return loss


# what counts


@BOTH
@pytest.mark.parametrize("synchronizes", [False, True])
def test_a_closures_evaluations_are_one_step(compression, synchronizes):
    net, optimizer = wrapped(compression, torch.optim.LBFGS, steps_per_epoch=4, max_iter=6)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = backward(net)
        if synchronizes:
            optimizer.synchronize()
        return loss

    for _ in range(8):
        if synchronizes:
            with optimizer.skip_synchronize():
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    assert calls > 16
    assert optimizer.stats.steps == 8 and optimizer._hvd.controller.epoch == 2


@BOTH
def test_synchronize_twice_is_one_step(compression):
    net, optimizer = wrapped(compression)
    for _ in range(3):
        optimizer.zero_grad()
        backward(net)
        optimizer.synchronize()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    assert optimizer.stats.steps == 3


def test_step_after_synchronize_warns_and_is_one_step():
    net, optimizer = wrapped(TopK(0.1))
    backward(net)
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="averaged already"):
        optimizer.step()
    assert optimizer.stats.steps == 1


def test_new_gradients_after_synchronize_are_exchanged():
    """By another backward pass, or put there by hand; no step in between, as after an overflow."""
    net, optimizer = wrapped(TopK(0.1))
    for _ in range(2):
        backward(net)
        optimizer.synchronize()
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.synchronize()
    assert optimizer.stats.steps == 4


# rates


class Decaying(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5
        return loss


BATCH = {"small": 4, "large": 16, "interval": 4, "unit": "steps", "eta": 100.0, "lr_drop": 0.01, "warmup": 0}


@pytest.mark.parametrize("batch_size", [None, AccordionBatchSize(**BATCH)], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rate_that_the_step_changes_stays_changed(batch_size, as_tensor):
    rate = torch.tensor(0.8) if as_tensor else 0.8
    net, optimizer = wrapped(Dense(), Decaying, batch_size, lr=rate, **({"foreach": False} if as_tensor else {}))
    for step in range(16):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    updates = 16 if batch_size is None else 8 + 2  # the last two of 4 micro-batches each, at 4 times the rate
    assert optimizer.stats.updates == updates
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.8 * 0.5**updates, rel=1e-6)
    assert not as_tensor or optimizer.param_groups[0]["lr"] is rate


def test_hooks_of_the_step_may_set_the_rate():
    net, optimizer = wrapped(Dense())
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.7))
    backward(net)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.7


# what it takes


def test_an_empty_dict_is_dense():
    net, optimizer = wrapped({})
    backward(net)
    optimizer.step()
    assert {row.spec for row in optimizer.compression_report()} == {"Dense()"}


@BOTH
def test_names_of_the_optimizers_own(compression):
    net = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(net.named_parameters(), lr=0.1), compression=compression)
    assert [row.name for row in optimizer.compression_report()] == [name for name, _ in net.named_parameters()]


def test_names_of_a_group_that_comes_later():
    net = network()
    first, last = list(net[0].named_parameters("0")), list(net[2].named_parameters("2"))
    optimizer = torch.optim.SGD(first, lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, compression={"*.bias": None, "*": TopK(0.1)})
    optimizer.add_param_group({"params": last})
    assert [row.name for row in optimizer.compression_report()] == [name for name, _ in first + last]
    assert optimizer.compression_report()[2].spec == "TopK(ratio=0.1)"
    with pytest.raises(ValueError, match="duplicates"):
        optimizer.add_param_group({"params": [(last[0][0], torch.nn.Parameter(torch.zeros(3)))]})
    assert len(optimizer.param_groups) == 2

    by_model = hvd.DistributedOptimizer(torch.optim.SGD(net[0].parameters()), net.named_parameters(), TopK(0.1))
    by_model.add_param_group({"params": net[2].parameters()})
    assert [row.name for row in by_model.compression_report()] == [name for name, _ in net.named_parameters()]


@BOTH
def test_a_complex_parameter_is_named(compression):
    net = network()
    net.turn = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameter turn is of dtype torch\.complex64"):
        hvd.DistributedOptimizer(torch.optim.SGD(net.parameters()), net.named_parameters(), compression)


@BOTH
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(compression, copied):
    _, optimizer = wrapped(compression)
    with pytest.raises(TypeError, match="can be neither copied nor pickled"):
        copied(optimizer)
    copy.deepcopy(optimizer.state_dict())


class Old(torch.optim.SGD):
    def zero_grad(self):
        super().zero_grad()


def test_zero_grad_takes_what_the_users_class_takes():
    for kind in (torch.optim.SGD, Old):
        net, optimizer = wrapped(TopK(0.1), kind)
        assert inspect.signature(optimizer.zero_grad) == inspect.signature(kind(net.parameters()).zero_grad)
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())


def test_plain_horovod_says_that_it_takes_up_no_compression():
    net, optimizer = wrapped(Accordion(), steps_per_epoch=2)
    backward(net)
    optimizer.step()
    _, plain = wrapped(None)
    with pytest.warns(UserWarning, match="all that compression kept") as told:
        plain.load_state_dict(optimizer.state_dict())
    assert len(told) == 1

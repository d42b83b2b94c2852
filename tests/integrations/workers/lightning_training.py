"""HorovodStrategy and HorovodCallback on two ranks against one process with the whole batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Dense, PowerSGD, TopK
from hvd_accordion.integrations.lightning import HorovodCallback, HorovodStrategy
from tests.integrations.workers.lightning_common import (
    Module,
    assert_equal_ranks,
    data,
    loader,
    one_process,
    trainer,
    weights,
)

CLIPPED = {"gradient_clip_val": 0.05}
CASES = {
    "plain": {},
    "norm": CLIPPED,
    "value": {"gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"},
    "accumulate": {**CLIPPED, "accumulate_grad_batches": 3},
    "limit": {"limit_train_batches": 3, "max_epochs": 3},
    "steps": {"max_steps": 5, "max_epochs": -1},
}
EXACT = {"none": None, "dense": Dense()}
LOSSY = {
    "powersgd": PowerSGD(2),
    "topk": TopK(0.1),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=TopK(0.1), interval=1),
}


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def lossy(compression, **options):
    return HorovodStrategy(compression, min_compress_numel=1, **options)


@pytest.mark.parametrize("compression", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, compression):
    expected = one_process(Module(), validation=16, **CASES[case])
    module = Module(seed=hvd.rank())
    trainer(HorovodStrategy(EXACT[compression]), **CASES[case]).fit(module, loader(), loader(samples=16, seed=1))
    close(weights(module), weights(expected))
    norms = torch.stack(expected.norms)
    assert "gradient_clip_val" not in CASES[case] or norms.max() > 0.1, "nothing was clipped"
    close(torch.stack(module.norms), norms)  # hooks see means, as under DDP
    close(torch.stack(module.validated), torch.stack(expected.validated))
    assert_equal_ranks(module)


@pytest.mark.parametrize("compression", EXACT)
def test_callback_as_one_process(compression):
    expected = one_process(Module(), accumulate_grad_batches=3, **CLIPPED)
    whole, module = data(), Module(seed=hvd.rank())
    mine = DataLoader(whole, 4, sampler=DistributedSampler(whole, hvd.size(), hvd.rank()))
    callback = HorovodCallback(EXACT[compression])
    trainer(callbacks=[callback], accumulate_grad_batches=3, **CLIPPED).fit(module, mine)
    close(weights(module), weights(expected))
    close(torch.stack(module.norms), torch.stack(expected.norms))
    assert_equal_ranks(module)


@pytest.mark.parametrize("samples", [30, 31])
def test_uneven_last_batches(samples):
    module = Module()
    trainer(HorovodStrategy()).fit(module, loader(samples=samples))
    assert_equal_ranks(module)
    if samples % hvd.size() == 0:  # else the sampler gives some twice
        close(weights(module), weights(one_process(Module(), samples)))


class Watched(Module):
    """Notes after each backward pass whether an exchange is on its way."""

    def __init__(self, seed):
        super().__init__(seed)
        self.on_their_way = []

    def backward(self, loss):
        super().backward(loss)
        self.on_their_way.append(self.optimizers().optimizer._hvd.in_flight)


@pytest.mark.parametrize("compression", LOSSY)
def test_lossy(compression):
    module = Watched(seed=hvd.rank())
    before = module.loss(data().tensors)
    fit = trainer(lossy(LOSSY[compression]), max_epochs=8, accumulate_grad_batches=2, gradient_clip_val=0.5)
    fit.fit(module, loader())
    assert_equal_ranks(module)
    assert module.loss(data().tensors) < 0.8 * before
    assert (
        module.on_their_way == [False, False] + [False, True] * 15
    )  # begun in the last backward pass; not the first time
    (optimizer,) = fit.optimizers
    assert optimizer.stats.steps == 8 * 2
    assert optimizer.stats.sent_bytes < 0.6 * optimizer.stats.dense_bytes
    if compression == "accordion":  # epochs were counted
        assert 0 < optimizer.stats.critical_fraction < 1


def plateau(optimizer):
    return {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5),
        "monitor": "val",
    }


def warmup(optimizer):
    up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [up, lr_scheduler.ExponentialLR(optimizer, 0.8)], [3])


@pytest.mark.parametrize("compression", EXACT)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
        lambda optimizer: {"scheduler": warmup(optimizer), "interval": "step"},
        plateau,
    ],
    ids=["epoch", "step", "plateau"],
)
def test_schedulers(schedule, compression):
    options = {"max_epochs": 4, "accumulate_grad_batches": 2}
    expected = one_process(Module(schedule=schedule), validation=16, **options)
    module = Module(schedule=schedule)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*step\\(\\)")  # torch's, of schedulers that step before their optimizer
        trainer(HorovodStrategy(EXACT[compression]), **options).fit(module, loader(), loader(samples=16, seed=1))
    assert len(set(expected.rates)) > 1
    assert module.rates == expected.rates
    close(weights(module), weights(expected))


class Adversaries(Module):
    """Two optimizers by hand, each with micro-batches of its own, clipped."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        score = self.other(self.net(batch[0])).mean()
        self.manual_backward(score)  # leaves gradients in both
        if batch_idx % 2:
            self.clip_gradients(first, gradient_clip_val=0.01)
            first.step()
            first.zero_grad()
        second.zero_grad()
        self.manual_backward(-self.other(self.net(batch[0]).detach()).square().mean())
        second.step()
        second.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1, 0.9), torch.optim.SGD(self.other.parameters(), 0.001)


@pytest.mark.parametrize("compression", [*EXACT, *LOSSY])
def test_manual_optimization(compression):
    module = Adversaries(seed=hvd.rank())
    trainer(lossy({**EXACT, **LOSSY}[compression])).fit(module, loader())
    assert_equal_ranks(module)
    if compression in EXACT:
        close(weights(module), weights(one_process(Adversaries())))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true", "bf16-true"])
def test_precision(precision):
    def options():
        if precision == "16-mixed":  # Lightning's own choice on a CPU is bf16-mixed
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)  # overflows at first
            return {"plugins": [MixedPrecision(precision, "cpu", scaler)], **CLIPPED}
        return {"precision": precision, **CLIPPED}

    for compression in (Dense(), TopK(0.1)):
        module = Module(seed=hvd.rank())
        fit = trainer(lossy(compression), accumulate_grad_batches=3, **options())
        fit.fit(module, loader())
        assert_equal_ranks(module)
        assert weights(module).isfinite().all()
        if compression == Dense():
            expected = one_process(Module(), accumulate_grad_batches=3, **options())
            close(weights(module), weights(expected), 1e-2 if "16" in precision else 1e-6)


def test_batch_size():
    """The batch grows after two epochs; each has one smaller batch at its end. As a loop by hand."""
    clip, epochs = 0.5, 5
    rule = AccordionBatchSize(4 * hvd.size(), 16 * hvd.size(), eta=1e3, interval=1, warmup=2)
    module = Module(schedule=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9))
    options = {"batch_size": rule, "min_compress_numel": 1}
    run = trainer(HorovodStrategy(TopK(0.1), **options), max_epochs=epochs, gradient_clip_val=clip)
    run.fit(module, loader(samples=56))

    net, whole = Module().net, data(56)
    sampler = DistributedSampler(whole, hvd.size(), hvd.rank())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, net.named_parameters(), TopK(0.1), steps_per_epoch=7, **options)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(whole, 4, sampler=sampler):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            with optimizer.skip_synchronize():
                optimizer.step()
        scheduler.step()
    assert torch.equal(weights(module), weights(net))
    assert run.optimizers[0].stats.updates == optimizer.stats.updates < 7 * epochs
    assert_equal_ranks(module)

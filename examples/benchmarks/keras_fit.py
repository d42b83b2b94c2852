"""Compares step times in Keras's fit, compressed and uncompressed, in one run, with the demo's network.

python examples/benchmarks/keras_fit.py [--rounds 15] [--json PATH]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from side_by_side import launch, parser, report, take_turns


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--steps", type=int, default=40, help="steps of a mode's turn: an epoch")
    options.add_argument("--steps-per-execution", type=int, default=1)
    args = options.parse_args()
    if not args.worker:
        sys.exit(launch(__file__))

    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_accordion.tensorflow.keras as hvd
    from hvd_accordion import Accordion, Dense, PowerSGD, TopK

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "keras"))
    from keras_mnist import network

    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    modes = {
        "compression=None": None,
        "Dense()": Dense(),
        "PowerSGD(4)": PowerSGD(4),
        "Accordion()": Accordion(critical=PowerSGD(4), relaxed=PowerSGD(1), interval=1),
        "TopK(0.01)": TopK(0.01),
    }
    rng = np.random.default_rng(hvd.rank())
    images = rng.standard_normal((args.steps * args.batch_size, 28, 28, 1)).astype("float32")
    labels = rng.integers(0, 10, len(images))
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(args.batch_size).cache().prefetch(2)
    models = {}
    for name, compression in modes.items():
        model = models[name] = network(seed=0)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9), compression=compression)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, steps_per_execution=args.steps_per_execution)

    def turn(name: str) -> float:
        tell = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback(), Timer()]
        models[name].fit(data, epochs=1, verbose=0, shuffle=False, callbacks=tell)
        return tell[-1].seconds / args.steps

    class Timer(keras.callbacks.Callback):
        """Measures from the first step of an epoch to its end, including checks of the norms."""

        def on_epoch_begin(self, epoch, logs=None):
            self.begin = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds = time.perf_counter() - self.begin

    times = take_turns(list(modes), turn, args.rounds)
    if hvd.rank() == 0:
        report(f"The demo's network, batch {args.batch_size}", times, args.json)


if __name__ == "__main__":
    main()

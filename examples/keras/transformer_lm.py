"""Trains a small GPT on a text file under Keras's fit, character by character, by one of several methods; or compares them.

horovodrun -np 2 python examples/keras/transformer_lm.py --method muon-local20-sign --text FILE
python examples/keras/transformer_lm.py --compare

The twin of examples/pytorch/transformer_lm.py, with the same text, batches, network, methods and output. Muon's rate is that
of Moonlight's scaling, with which 0.01 here is 0.02 there for all matrices but `down`, where it is half of it.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import keras
import tensorflow as tf
from keras_gpt import gpt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from language_model import compare, text
from language_model.methods import DENSE, METHODS

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import MLflowLogger

parser = argparse.ArgumentParser(description="A small GPT in Keras on Horovod, trained by the method of your choice")
parser.add_argument("--method", choices=METHODS, default=DENSE)
parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn, in UTF-8; default: CPython's help")
parser.add_argument("--steps", type=int, default=1500, help="a multiple of --every")
parser.add_argument("--batch", type=int, default=16, help="sequences in a step of all ranks together")
parser.add_argument("--context", type=int, default=64, help="characters of a sequence")
parser.add_argument("--width", type=int, default=96)
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--lr", type=float, default=4e-3, help="of AdamW")
parser.add_argument("--muon-lr", type=float, default=0.01, help="of Muon")
parser.add_argument("--weight-decay", type=float, default=0.01)
parser.add_argument("--warmup", type=int, default=100, help="steps in which the rates grow to their full size")
parser.add_argument("--dense-steps", type=int, default=300, help="of 1-bit Adam, before it sends momentum")
parser.add_argument("--drop", type=float, default=0.67, help="share of the steps after which the rates drop x0.1")
parser.add_argument("--clip", type=float, default=1.0, help="limit of the gradients' norm")
parser.add_argument("--every", type=int, default=100, help="steps from one validation to the next")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--run-name", help="in MLflow; by default the method")
parser.add_argument(
    "--history", type=Path, metavar="FILE", help="write the result, and loss by bytes and time, as JSON"
)
parser.add_argument("--no-progress", action="store_true", help="no progress bar")
compare.add_arguments(parser, out="transformer-keras")


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """Grows evenly in the warm-up, stays, drops to a tenth."""

    def __init__(self, peak, warmup, drop):
        self.peak, self.warmup, self.drop = peak, warmup, drop

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        grown = tf.minimum(1.0, (step + 1) / self.warmup)
        return self.peak * grown * tf.where(step >= self.drop, 0.1, 1.0)

    def get_config(self):
        return {"peak": self.peak, "warmup": self.warmup, "drop": self.drop}


def outer(momentum):
    """What makes the outer optimizer of local steps."""
    return functools.partial(keras.optimizers.SGD, 1.0, momentum=momentum)


def distributed(args, logger):
    """The method's optimizer over Horovod: AdamW for all, or Muon, which is AdamW for all but the blocks' matrices."""
    method = METHODS[args.method]
    schedule = {"warmup": args.warmup, "drop": args.drop * args.steps}
    options = {"weight_decay": args.weight_decay, "global_clipnorm": args.clip}
    if method.optimizer == "OneBitAdam":  # averages over the ranks by itself
        rate = Rate(args.lr, **schedule)
        return hvd.OneBitAdam(rate, beta_2=0.95, warmup_steps=args.dense_steps, logger=logger, **options)
    if method.optimizer == "Muon":
        optimizer = keras.optimizers.Muon(
            Rate(args.muon_lr, **schedule),
            adam_lr_ratio=args.lr / args.muon_lr,
            adam_beta_2=0.95,
            adam_weight_decay=args.weight_decay,
            exclude_layers=["head"],
            **options,
        )
    else:
        optimizer = keras.optimizers.AdamW(Rate(args.lr, **schedule), beta_2=0.95, **options)
    # hvd_accordion: choose the compression, and how many steps each rank takes by itself.
    local = {} if (steps := method.local_steps(outer)) is None else {"local_steps": steps}
    return hvd.DistributedOptimizer(optimizer, compression=method.compression(), seed=args.seed, logger=logger, **local)


class Record(keras.callbacks.Callback):
    """Progress bar, seconds of training without those of validation, and at each validation bytes sent and loss."""

    def __init__(self, bar, logger):
        super().__init__()
        self.bar, self.logger = bar, logger
        self.seconds, self.points, self.clock = 0.0, [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()

    def on_test_begin(self, logs=None):
        self.seconds += time.perf_counter() - self.begin

    def on_epoch_end(self, epoch, logs=None):
        self.points.append([self.model.optimizer.stats.sent_bytes, logs["val_loss"]])
        self.clock.append(self.seconds)
        self.bar.set_postfix_str(f"loss {logs['val_loss']:.3f}", refresh=False)
        if self.logger:
            self.logger.log_metrics({"validation_loss": logs["val_loss"]}, self.bar.n)


def train(args):
    # Horovod: initialize library.
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    keras.utils.set_random_seed(args.seed)
    first, ranks = hvd.rank() == 0, hvd.size()

    data = text.load(args.text, args.context)
    window = tf.TensorSpec((None, args.context + 1), tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: text.batches(data.train, args.context, args.batch, args.seed, hvd.rank(), ranks),
        output_signature=window,
    )
    windows = text.windows(data.validation, args.context, hvd.rank(), ranks)
    # equally many on all ranks, so that the mean of their means is that of all
    windows = windows[: len(data.validation) // (args.context + 1) // ranks].astype("int32")

    logger = None
    if args.mlflow_uri and first:
        settings = {name: str(value) for name, value in vars(args).items()}
        logger = MLflowLogger(args.mlflow_uri, "transformer_lm", args.run_name or args.method, settings)
    model = gpt(data.vocabulary, args.context, args.width, args.layers, args.heads)
    optimizer = distributed(args, logger)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    bar = tqdm(
        total=args.steps,
        desc=args.run_name or args.method,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=args.no_progress or not first,
    )
    record = Record(bar, logger)
    callbacks = [
        # Horovod: broadcast initial variable states from rank 0 to all other processes.
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        # Horovod: average metrics among workers; before callbacks that use them.
        hvd.callbacks.MetricAverageCallback(),
        record,
    ]
    model.fit(
        batches.map(lambda tokens: (tokens[:, :-1], tokens[:, 1:])),
        epochs=args.steps // args.every,
        steps_per_epoch=args.every,
        validation_data=(windows[:, :-1], windows[:, 1:]),
        validation_batch_size=64,
        callbacks=callbacks,
        verbose=0,
    )
    bar.close()

    if not first:
        return
    if logger:
        logger.finish()
    result = {
        "method": args.method,
        "validation_loss": record.points[-1][1],
        "tokens_per_second": round(args.steps * args.batch * args.context / record.seconds),
        "sent_bytes": round(optimizer.stats.sent_bytes),
        "dense_bytes": round(optimizer.stats.dense_bytes),
        "steps": args.steps,
        "seconds": round(record.seconds, 3),
        "ranks": ranks,
        "seed": args.seed,
    }
    # in one write: horovodrun puts a tag before each
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    if args.history:
        args.history.write_text(
            json.dumps({**result, "points": record.points, "clock": record.clock}), encoding="utf-8"
        )


if __name__ == "__main__":
    args = parser.parse_args()
    if args.steps % args.every:
        parser.error(f"--steps must be a multiple of --every={args.every}, got {args.steps}")
    if args.compare is None:
        train(args)
    else:
        compare.run(Path(__file__), args)

"""The trainings that keras_checkpoint_save.py interrupts and keras_checkpoint_resume.py goes on with."""

import os
from pathlib import Path

import keras
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from tests.parallel.workers.tensorflow.keras_common import SPECS, compiled, model, sgd

NAMES = ["topk", "randomk", "qsgd1", "powersgd4", "powersgd2-twice", "accordion", "accordion-kinds", "globs", "none"]


def built(name):
    keras.backend.clear_session()
    net = model()
    net, optimizer = compiled(SPECS[name], sgd(), net)
    optimizer.build(net.trainable_variables)
    return net, optimizer


def path(name, what, rank=None):
    return str(Path(os.environ["CHECKPOINTS"]) / f"{name}.{what}.{hvd.rank() if rank is None else rank}")


def checkpoint(net, optimizer):
    return tf.train.Checkpoint(model=net, optimizer=optimizer)

"""One rank, without horovodrun; and two in one process, where collectives are simulated."""

from __future__ import annotations

import pytest
import tensorflow as tf
from horovod.common import process_sets
from horovod.tensorflow import mpi_ops

import hvd_accordion.tensorflow as hvd


@pytest.fixture(scope="module", autouse=True)
def horovod():
    """Horovod's process sets ask the framework that was imported last, which in this process may have been torch."""
    asked = process_sets._basics
    process_sets._setup(mpi_ops._basics)
    hvd.init()
    yield
    process_sets._setup(asked)


class Twins(hvd.ProcessSet):
    """Rank 0 of two, or of `count`, that always have the same gradients."""

    process_set_id, ranks = 0, [0, 1]

    def __init__(self):
        self.count = 2

    def size(self):
        return self.count

    def rank(self):
        return 0

    def included(self):
        return True


@pytest.fixture
def twins(monkeypatch):
    """A process set of two ranks that always have the same gradients; their collectives need nobody else."""
    ranks = Twins()

    def reduced(x, op, prescale_factor=1.0, postscale_factor=1.0, **_):
        return (
            x if op == hvd.Max else x * ((1 if op == hvd.Average else ranks.count) * prescale_factor * postscale_factor)
        )

    import horovod.tensorflow as theirs

    for name, collective in {
        "allgather": lambda x, **_: tf.concat([x] * ranks.count, axis=0),
        "alltoall": lambda x, **_: tf.stack([x[0]] * ranks.count),
        "allreduce": lambda x, **where: reduced(x, **where),
        "grouped_allreduce": lambda xs, **where: [reduced(x, **where) for x in xs],
        "broadcast": lambda x, root_rank, **_: x,
    }.items():
        monkeypatch.setattr(theirs, name, collective)
    return ranks

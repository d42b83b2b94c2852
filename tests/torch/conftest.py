"""Of Horovod's two frameworks in one process, torch."""

from __future__ import annotations

import pytest
from horovod.common import process_sets
from horovod.torch import mpi_ops


@pytest.fixture(scope="module", autouse=True)
def process_sets_of_torch():
    """Horovod's process sets ask the framework that was imported last, which in this process may be TensorFlow."""
    asked = process_sets._basics
    process_sets._setup(mpi_ops._basics)
    yield
    process_sets._setup(asked)

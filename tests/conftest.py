"""Quiet frameworks on one thread: more threads only slow tensors as small as these."""

from __future__ import annotations

import gc
import os

import pytest

# TensorFlow reads them once, when it is imported; ranks that tests/parallel starts inherit them
os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """Keeps the collector, which Keras calls for every new session, from walking through all that imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def mlflow_environment():
    """mlflow.set_experiment() leaves an id in the environment, which means another experiment on the next test's server."""
    before = os.environ.get("MLFLOW_EXPERIMENT_ID")
    yield
    if before is None:
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)

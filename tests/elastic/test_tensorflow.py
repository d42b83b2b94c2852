"""Elastic jobs under TensorFlow and Keras, in the forms that Horovod documents."""

import importlib.util
from itertools import pairwise

import pytest

from tests.elastic.changes import sizes
from tests.elastic.job import run

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

# How long ranks wait for one that comes, and has TensorFlow to import; and survivors for each other when one has seen before
# the others that a peer died.
PATIENCE = "60"


def test_a_loop_of_the_users(tmp_path):
    changes = ["add 1", "add 1", "remove 0", "add 1", "kill 1 2"]
    events = run("tensorflow/loop", tmp_path, 1, changes, timeout=240, HOROVOD_GLOO_TIMEOUT_SECONDS=PATIENCE)
    entered = [e["size"] for e in events if e["rank"] == 0 and "over" not in e]
    assert entered == sizes(1, changes) == [1, 2, 3, 2, 3, 1], events
    (end,) = (e for e in events if "over" in e)
    assert "relaxed" in end["regimes"], end
    assert end["traced"] <= 3, end  # without an exchange, with one, for batches of any size
    assert_losses_go_on([e["losses"] for e in events if e["rank"] == 0])


def test_fit(tmp_path):
    changes = ["kill 2", "add 1", "remove 0"]
    events = run("tensorflow/fit", tmp_path, 3, changes, timeout=240, HOROVOD_GLOO_TIMEOUT_SECONDS="15")
    end, other = (e for e in events if "over" in e)
    assert end["size"] == other["size"] == 2 and {e["size"] for e in events} == {2, 3}, events
    assert end["passes"] == 2 and "relaxed" in end["regimes"], end
    assert end["epochs"] == end["epoch"] == other["epoch"] > 1, events  # what the optimizer counts, and the state
    assert_losses_go_on([e["losses"] for e in events if e["rank"] == 0])


def assert_losses_go_on(losses):
    """Those of all examples, of each compression."""
    for before, after in pairwise(losses):
        assert all(new < 1.05 * old for old, new in zip(before, after, strict=True)), losses
    assert all(last < 0.7 * first for first, last in zip(losses[0], losses[-1], strict=True)), losses

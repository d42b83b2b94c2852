"""What only real ranks can show: each case is a pytest file of workers/, run on every rank by horovodrun."""

import sys
import time

import pytest
from launcher import horovodrun, marked, worker

pytestmark = pytest.mark.parallel


def test_plain_is_horovod():
    worker("plain", ranks=2)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "mpi"), (2, "gloo"), (4, "mpi"), (4, "gloo")])
def test_specs(ranks, transport):
    worker("specs", ranks, transport, timeout=300)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gloo"), (4, "mpi")])
def test_optimizer(ranks, transport):
    worker("optimizer", ranks, transport, timeout=300)


def test_hot_path():
    worker("hot_path", ranks=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_errors(ranks):
    worker("errors", ranks)


def test_checkpoint(tmp_path):
    worker("checkpoint_save", ranks=2, CHECKPOINTS=str(tmp_path))
    worker("checkpoint_resume", ranks=2, CHECKPOINTS=str(tmp_path))


def test_logging(tmp_path):
    worker("logging_run", ranks=2, LOGS=str(tmp_path))


def test_traffic():
    # Horovod's ranks talk once a cycle, sent or not: few cycles, or a slow machine counts too much of that
    worker("traffic", ranks=2, transport="gloo", HOROVOD_CYCLE_TIME="20")


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_a_hang_fails_and_leaves_nothing_behind(transport):
    """The launcher itself: a rank that never comes to its collective."""
    hang = "import time, hvd_accordion.torch as hvd; hvd.init(); hvd.rank() or time.sleep(600); hvd.barrier()"
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="not done after"):
        horovodrun([sys.executable, "-c", hang], 2, transport, timeout=12, HVD_ACCORDION_TEST_HANG=transport)
    assert time.monotonic() - begin < 30
    assert not marked(transport, "HVD_ACCORDION_TEST_HANG")

"""The harness itself, with Horovod alone."""

import pytest
from changes import sizes
from job import run
from launcher import marked

pytestmark = pytest.mark.parallel


def test_workers_come_go_and_die(tmp_path):
    changes = ["remove 0", "add 2", "kill 0 2"]
    events = run("torch/horovods_own", tmp_path, 2, changes, timeout=90)
    entered = [e["size"] for e in events if e["rank"] == 0]
    assert entered == sizes(2, changes) == [2, 1, 3, 1], events


def test_a_job_that_hangs_fails_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(AssertionError, match="not done after"):
        run("torch/horovods_own", tmp_path, 2, ["remove 9"], timeout=12, HVD_ACCORDION_TEST_HANG="elastic")
    assert not marked("elastic", "HVD_ACCORDION_TEST_HANG")

"""The harness itself, with Horovod alone."""

import pytest

from tests.elastic.job import run
from tests.parallel.launcher import marked

pytestmark = pytest.mark.parallel


def test_a_job_that_hangs_fails_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(AssertionError, match="not done after"):
        run("torch/horovods_own", tmp_path, 2, ["remove 9"], timeout=10, HVD_ACCORDION_TEST_HANG="elastic")
    assert not marked("elastic", "HVD_ACCORDION_TEST_HANG")

"""A start of several worker files: each file has its own result, and what a rank failed is told as that rank's test."""

import shutil

import pytest

from tests.parallel.launcher import marked
from tests.parallel.starts import Case, Starts

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun not found: apt-get install openmpi-bin"),
]

PASSES, TOO = Case("ranks/passes"), Case("ranks/passes_too")
FAILURES = {
    Case("ranks/fails"): ("rank 1: ranks/fails.py::test_of_rank_1 failed in call", "AssertionError: the reason"),
    Case("ranks/dies"): ("rank 0: ranks/dies.py::test_of_rank_0 did not end", "exit status 3"),
    Case("ranks/hangs"): ("rank 1: ranks/hangs.py::test_of_rank_1 did not end", "Timeout"),
    Case("ranks/empty"): ("ranks/empty-2-mpi", "exit status"),
}


def test_a_failing_file_is_told_apart_from_those_beside_it(tmp_path):
    first, *others = FAILURES
    starts = Starts([PASSES, first, TOO, *others], tmp_path, {"STARTS_TEST": str(tmp_path)})
    for case in starts.cases:
        if case in FAILURES:
            with pytest.raises(AssertionError) as failed:
                starts.check(case)
            assert all(part in str(failed.value) for part in FAILURES[case]), failed.value
        else:
            starts.check(case)
    assert len(list(tmp_path.glob("*/output"))) == len(FAILURES)  # what passes between them costs no start
    starts.finish()
    assert not marked(str(tmp_path), "STARTS_TEST")


def test_a_file_that_reads_anothers_results_waits_for_them(tmp_path):
    after = Case("ranks/passes", transport="gloo", after=("ranks/passes_too",))
    starts = Starts([after], tmp_path, {})
    starts.check(after)
    assert list(starts.done) == [TOO, after]

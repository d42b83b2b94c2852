"""Ranks of launchers that Horovod does not know, and those of another MPI than Horovod's."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from hvd_accordion.comm.launch import YIELD
from tests.parallel.launcher import WORKERS, run

pytestmark = pytest.mark.parallel

PYTHON = sys.executable
TORCHRUN = Path(PYTHON).parent / "torchrun"
LAUNCHED = str(WORKERS / "launched.py")
START = [PYTHON, str(WORKERS / "start.py"), "2"]
SRUN = [
    *START,
    *("SLURM_JOB_ID=7", "SLURM_STEP_ID=0", "SLURM_NTASKS=2", "SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_NODES=1"),
    *("SLURM_STEP_NODELIST=node1", "SLURM_NODEID=0", "SLURM_PROCID={i}", "SLURM_LOCALID={i}", "--"),
]
CHECK = [PYTHON, "-m", "hvd_accordion", "check", "--parameters", "1e5"]


@pytest.mark.skipif(not TORCHRUN.exists(), reason="torchrun not found: pip install torch")
def test_every_module_under_torchrun():
    modules = [f"hvd_accordion.{name}" for name in ("torch", "tensorflow", "tensorflow.keras", "keras")]
    output = run([str(TORCHRUN), "--nproc-per-node", "2", LAUNCHED, "2", *modules])
    for name in modules:
        for rank in range(2):
            assert f"{name}: {rank} of 2, {rank} of 2, 0 of 1; None\n" in output, output


def test_srun():
    output = run([*SRUN, PYTHON, LAUNCHED, "2", "hvd_accordion.torch"])
    for rank in range(2):
        assert f"hvd_accordion.torch: {rank} of 2, {rank} of 2, 0 of 1; None\n" in output, output


def test_check_under_srun():
    output = run([*SRUN, *CHECK, "--framework", "torch"])
    assert output.count("Software") == 1 and "Nothing is broken." in output  # rank 0 alone prints
    assert "2 ranks, by torch" in output and ": 2 of 2 ranks" in output


def test_mpiexec_of_another_mpi():
    train = [PYTHON, "-c", "import hvd_accordion.torch as hvd; hvd.init(); print('trains alone')"]
    with pytest.raises(AssertionError, match="exit status 1") as ended:
        run([*START, "PMI_SIZE=2", "PMI_RANK={i}", "--", *train], timeout=60)
    error = "StartError: mpiexec started 2 processes (PMI_SIZE=2), but to Horovod each is alone"
    assert str(ended.value).count(error) == 2 and "trains alone" not in str(ended.value)


def test_a_process_that_ends_before_the_others_come():
    code = "import os, hvd_accordion.torch as hvd; os.environ['SLURM_PROCID'] == '1' or hvd.init()"
    with pytest.raises(AssertionError, match="exit status 1") as ended:
        run([*SRUN, PYTHON, "-c", code], timeout=60, HOROVOD_START_TIMEOUT="2")
    assert "srun started 2 processes (SLURM_STEP_NUM_TASKS=2), but rank 1 did not come to hvd.init() within 2 s" in str(
        ended.value
    )


@pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun not found: apt-get install openmpi-bin")
def test_open_mpis_waiting_threads_yield():
    """On a host with fewer than two cores a rank; the others are hidden from them."""
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-bind-to", "none", "-np", "2"]
    hidden = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    unsaid = ["env", "-u", YIELD]
    output = run([*unsaid, *mpirun, *hidden, PYTHON, LAUNCHED, "2", "hvd_accordion.torch"])
    assert output.count("0 of 1; 1\n") == 2, output
    assert output.count(f"log: MPI's waiting threads leave their cores to others, {YIELD}=1: 2 ranks, 1 cores") == 1

"""torchrun and srun on several hosts: each rank finds the others by the address that they reach it by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parents[1] / "parallel" / "workers"
TORCHRUN = Path(sys.executable).parent / "torchrun"
RANK = [str(WORKERS / "launched.py"), "4", "hvd_accordion.torch"]
pytestmark = [pytest.mark.parallel, pytest.mark.timeout(200)]


def torchrun(host, address):
    start = [
        str(TORCHRUN),
        "--nnodes",
        "2",
        "--node-rank",
        str(host),
        "--nproc-per-node",
        "2",
        "--master-addr",
        address,
    ]
    return [*start, *RANK], {}


def srun(host, address):
    """As srun would start its two tasks on each host, in turn: ranks 0 and 2 on the first."""
    start = [sys.executable, str(WORKERS / "start.py"), "2", f"NUMBER={{i}}{host}", "--"]
    task = ["bash", "-c", 'export SLURM_PROCID=$((2#$NUMBER)); exec "$0" "$@"', sys.executable, *RANK]  # in binary
    return [*start, *task], {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_NODEID": str(host),
    }


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_ranks_on_two_hosts(bring_up, launcher, tmp_path):
    hosts = bring_up(2)
    jobs = []
    for host, name in enumerate(hosts.names):
        command, environment = launcher(host, hosts.names[0])
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HOROVOD_START_TIMEOUT": "60"}
        with open(tmp_path / name, "wb") as output:
            jobs.append(hosts.start(host, command, env={**quiet, **environment}, output=output))
    try:
        ended = [job.wait(120) for job in jobs]
    except subprocess.TimeoutExpired:
        ended = None
    said = "".join((tmp_path / name).read_text(errors="replace") for name in hosts.names)
    assert ended == [0, 0], said
    places = ["0 of 4, 0 of 2, 0 of 2", "1 of 4, 1 of 2, 0 of 2", "2 of 4, 0 of 2, 1 of 2", "3 of 4, 1 of 2, 1 of 2"]
    if launcher is srun:
        places[1:3] = ["1 of 4, 0 of 2, 1 of 2", "2 of 4, 1 of 2, 0 of 2"]
    for place in places:
        assert f"hvd_accordion.torch: {place}; None\n" in said, said

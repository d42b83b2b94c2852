"""Who started a process, by what launchers leave in the environment."""

from __future__ import annotations

import pytest

from hvd_accordion.comm.launchers import Launched, first_host, launched

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
    "SLURM_NODEID": "1",
}
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
BY_TORCHRUN = Launched("torchrun", 3, 4, "WORLD_SIZE", "node1", "1", "torchrun none node1:29500 4")
BY_SRUN = Launched("srun", 1, 2, "SLURM_STEP_NUM_TASKS", "gpu07", "1", "srun 7.2")


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, Launched()),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}, Launched("horovodrun", 1, 4, "HOROVOD_SIZE")),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
            Launched("Open MPI's mpirun", 3, 4, "OMPI_COMM_WORLD_SIZE"),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, Launched("mpiexec", 0, 2, "PMI_SIZE")),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, Launched()),
        (TORCHRUN, BY_TORCHRUN),
        (SRUN, BY_SRUN),
        (
            KUBEFLOW,
            Launched("the launcher", 1, 2, "WORLD_SIZE", "job-master-0", "", "the launcher  job-master-0:23456 2"),
        ),
        # one inside the other: who started the process itself counts
        ({**SRUN, **TORCHRUN}, BY_TORCHRUN),
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2"}, BY_SRUN),
        (
            {**SRUN, "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"},
            Launched("Open MPI's mpirun", 5, 8, "OMPI_COMM_WORLD_SIZE"),
        ),
        ({**TORCHRUN, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, Launched("horovodrun", 0, 1, "HOROVOD_SIZE")),
    ],
)
def test_the_launcher(environ, found):
    assert launched(environ) == found


def test_one_host_needs_no_name():
    here = launched({**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"})
    assert here.address == "127.0.0.1" and here.node == "0"
    assert launched({**SRUN, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        # the script of sbatch: task 0 of its own, whatever tasks srun may start later
        {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "a[1-2]",
        },
        # the shell of salloc on a login node
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-2]"},
        # the shell of salloc in an interactive step on a node
        {**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # a variable of somebody's own
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "1"},
    ],
    ids=["sbatch", "salloc", "salloc, interactive step", "WORLD_SIZE", "no MASTER_ADDR"],
)
def test_who_is_alone_on_purpose(environ):
    assert launched(environ).size == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,09],login", "node03"),
        ("node[7,9]", "node7"),
        ("gpu[1-2]-ib[0-1].site,other", "gpu1-ib0.site"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first

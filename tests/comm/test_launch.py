"""`init`: what it sets before Horovod starts, and what it refuses after. Horovod is a stand-in."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from hvd_accordion.comm import launch
from hvd_accordion.comm.launch import YIELD, initialiser, joins, start_seconds, yields
from hvd_accordion.comm.launchers import StartError, launched

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


class Horovod(SimpleNamespace):
    """One that sees `ranks` ranks."""

    def __init__(self, ranks=1, gloo=True):
        built = {"mpi_built": lambda: True, "gloo_built": lambda: gloo}
        super().__init__(calls=[], is_initialized=lambda: bool(self.calls), size=lambda: ranks, **built)

    def init(self, *arguments):
        self.calls.append(arguments)


@pytest.fixture
def environ(monkeypatch):
    """This process's environment, without what launchers leave there; and nobody to meet."""
    made = {}
    monkeypatch.setattr(launch, "_met", [])
    monkeypatch.setattr(launch, "os", SimpleNamespace(environ=made))
    monkeypatch.setattr(launch, "available_cores", lambda: 2)
    monkeypatch.setattr(launch.rendezvous, "join", lambda me, _, seconds: {"MET": me.launcher, "WITHIN": str(seconds)})
    return made


def test_without_a_launcher_it_is_horovods_init(environ):
    horovod = Horovod()
    initialiser(horovod)([0], process_sets="dynamic")
    assert horovod.calls == [([0], "dynamic")] and not environ


@pytest.mark.parametrize("started", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_ranks_that_horovod_does_not_know_meet_before_it_starts(environ, started):
    environ |= started
    horovod = Horovod(ranks=2)
    initialiser(horovod)()
    assert environ["MET"] == launched(started).launcher and environ["WITHIN"] == "300.0"
    assert horovod.calls == [(None, None)]
    del environ["MET"]
    initialiser(horovod)()  # without effect
    assert "MET" not in environ


def test_ranks_meet_anew_after_a_shutdown(environ, monkeypatch):
    environ |= TORCHRUN
    jobs = []

    def join(me, seen, _):
        assert not any(name.startswith("HOROVOD_") for name in seen)
        jobs.append(me.job)
        return {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(len(jobs))}

    monkeypatch.setattr(launch.rendezvous, "join", join)
    for _ in range(3):
        initialiser(Horovod(ranks=2))()
    assert len(set(jobs)) == 3 and environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "3"


@pytest.mark.parametrize(
    "started",
    [
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {**TORCHRUN, "HOROVOD_CONTROLLER": "mpi"},
        {**SRUN, "PMIX_RANK": "1"},
        MPIRUN,
    ],
    ids=["another MPI", "torchrun, but MPI is wanted", "srun --mpi=pmix", "mpirun"],
)
def test_several_processes_that_are_alone_to_horovod_raise(environ, started):
    environ |= started
    me = launched(started)
    with pytest.raises(StartError, match=rf"{me.launcher} started 2 processes \({me.variable}=2\)") as raised:
        initialiser(Horovod(ranks=1))()
    assert f"unset {me.variable}" in str(raised.value) and "MET" not in environ
    initialiser(Horovod(ranks=2))()
    initialiser(Horovod(ranks=1))(comm=[me.rank])  # a communicator of one, on purpose
    environ["HOROVOD_ELASTIC"] = "1"  # its size changes, the variable does not
    initialiser(Horovod(ranks=1))()


def test_horovod_that_was_started_alone_before(environ):
    horovod = Horovod(ranks=1)
    horovod.init()
    environ |= TORCHRUN
    with pytest.raises(StartError, match="torchrun started 2 processes"):
        initialiser(horovod)()


def test_what_cannot_be_under_torchrun(environ):
    environ |= TORCHRUN
    with pytest.raises(ValueError, match=r"comm=\[0, 1\]: only where MPI starts the ranks; under torchrun"):
        initialiser(Horovod())([0, 1])
    with pytest.raises(StartError, match="HOROVOD_WITH_GLOO=1"):
        initialiser(Horovod(gloo=False))()


@pytest.mark.parametrize(
    ("environ", "mpi_built", "expected"),
    [
        (TORCHRUN, True, True),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, True, False),
        ({**TORCHRUN, "HOROVOD_CYCLE_TIME": "5", "HOROVOD_CONTROLLER": "gloo"}, True, True),
        ({**TORCHRUN, "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1"}, True, False),
        ({**TORCHRUN, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, True, False),
        ({**TORCHRUN, "HOROVOD_CPU_OPERATIONS": "MPI"}, True, False),
        (SRUN, True, True),
        ({**SRUN, "PMIX_RANK": "1"}, True, False),
        ({**SRUN, "PMIX_RANK": "1"}, False, True),
        ({**SRUN, "PMIX_RANK": "1", "HOROVOD_CONTROLLER": "gloo"}, True, True),
        (MPIRUN, True, False),
    ],
)
def test_what_the_user_chose_is_left_alone(environ, mpi_built, expected):
    assert joins(launched(environ), environ, mpi_built) is expected


@pytest.mark.parametrize(
    ("environ", "cores", "expected"),
    [
        (MPIRUN, 2, True),
        (MPIRUN, 3, True),
        (MPIRUN, 4, False),
        ({**MPIRUN, YIELD: "0"}, 2, False),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 2, False),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 1, True),
        (TORCHRUN, 1, False),
        ({}, 1, False),
    ],
)
def test_waiting_threads_yield_where_ranks_have_fewer_than_two_cores(environ, cores, expected):
    assert yields(environ, cores) is expected


def test_it_is_set_and_told_of_once(environ, caplog):
    environ |= MPIRUN
    with caplog.at_level(logging.INFO, "hvd_accordion"):
        initialiser(Horovod(ranks=2))()
        initialiser(Horovod(ranks=2))()
        environ |= {"OMPI_COMM_WORLD_RANK": "1"}
        del environ[YIELD]
        initialiser(Horovod(ranks=2))()
    assert environ[YIELD] == "1"
    assert caplog.messages == [f"MPI's waiting threads leave their cores to others, {YIELD}=1: 2 ranks, 2 cores"]


def test_start_timeout():
    assert start_seconds({}) == 300 and start_seconds({"HOROVOD_START_TIMEOUT": "7.5"}) == 7.5
    for wrong in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(ValueError, match=rf"HOROVOD_START_TIMEOUT must be a number of seconds > 0, got '{wrong}'"):
            start_seconds({"HOROVOD_START_TIMEOUT": wrong})

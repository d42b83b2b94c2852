"""Horovod's `init`, under launchers that Horovod does not know too, and never as one rank where several were started.

Horovod itself knows horovodrun and the MPI that it was built with. Under all others each process is rank 0 of 1 to it, trains
alone, and nobody is told.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, MutableMapping
from types import ModuleType
from typing import Any

from hvd_accordion.comm import rendezvous
from hvd_accordion.comm.launchers import Launched, StartError, launched

log = logging.getLogger("hvd_accordion")

YIELD = "OMPI_MCA_mpi_yield_when_idle"
START_SECONDS = 300.0  # frameworks are imported before, and a busy machine takes long over it
_met: list[dict[str, str]] = []  # what each `init` of this process under such a launcher has set


def initialiser(horovod: ModuleType) -> Callable[..., None]:
    """`init` for a module that mirrors one of Horovod's."""

    def init(comm: Any = None, process_sets: Any = None) -> None:
        """Starts Horovod, as Horovod's own `init` does, which takes the same arguments.

        Under torchrun and srun, whose ranks Horovod's own leaves alone, they meet by Gloo. Under Open MPI waiting threads
        leave their cores to others where ranks have fewer than two each.

        Args:
            comm: ranks, or an mpi4py communicator; only where MPI starts the ranks.
            process_sets: a list of `hvd.ProcessSet`, or "dynamic".

        Raises StartError on each process where a launcher started several and Horovod sees only one, and where ranks do not
        come to `init` within HOROVOD_START_TIMEOUT seconds (300); ValueError for `comm` without MPI.
        """
        me = launched(os.environ) if horovod.is_initialized() else prepare(horovod, comm, os.environ)
        horovod.init(comm, process_sets)
        if not comm and "HOROVOD_ELASTIC" not in os.environ and horovod.size() == 1 < me.size:
            raise StartError(
                f"{me.launcher} started {me.size} processes ({me.variable}={me.size}), but to Horovod each is alone: nothing "
                "would be exchanged. Start them by horovodrun, torchrun, srun, or the mpirun that Horovod was built with; "
                f"if this process is meant to be alone, unset {me.variable}"
            )

    return init


def prepare(horovod: ModuleType, comm: Any, environ: MutableMapping[str, str]) -> Launched:
    """Sets what Horovod reads from the environment when it starts, as far as the user has not. Returns who started it."""
    # a server of Horovod's serves one start; after another, or after `shutdown`, ranks meet at a new one
    for name, value in (_met[-1] if _met else {}).items():
        if environ.get(name) == value:
            del environ[name]
    me = launched(environ)
    if joins(me, environ, horovod.mpi_built()):
        if comm:
            raise ValueError(f"comm={comm!r}: only where MPI starts the ranks; under {me.launcher} use process_sets")
        if not horovod.gloo_built():
            raise StartError(f"under {me.launcher} ranks meet by Gloo: build Horovod with HOROVOD_WITH_GLOO=1")
        again = me._replace(job=f"{me.job} {len(_met)}")
        _met.append(rendezvous.join(again, environ, start_seconds(environ)))
        environ.update(_met[-1])
    cores = available_cores()
    if yields(environ, cores):
        environ[YIELD] = "1"
        if me.rank == 0:
            ranks = environ["OMPI_COMM_WORLD_LOCAL_SIZE"]
            log.info("MPI's waiting threads leave their cores to others, %s=1: %s ranks, %d cores", YIELD, ranks, cores)
    return me


def joins(me: Launched, environ: Mapping[str, str], mpi_built: bool) -> bool:
    """Whether ranks must be brought together here: Horovod does not know their launcher, and no user says otherwise."""
    told = any(name in environ for name in ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_RANK", "HOROVOD_SIZE"))
    chosen = {environ.get(name, "").lower() for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")}
    # srun --mpi=pmix: Open MPI finds the others by itself
    pmix = me.launcher == "srun" and "PMIX_RANK" in environ and mpi_built and "gloo" not in chosen
    return me.size > 1 and bool(me.address) and not (told or pmix or "mpi" in chosen)


def yields(environ: Mapping[str, str], cores: int) -> bool:
    """Whether Open MPI's waiting threads should leave their core to others: its ranks here have fewer than two cores each.

    A rank computes and waits on two threads. Never where the user has said either.
    """
    ranks = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    return ranks.isdigit() and 2 * int(ranks) > cores and YIELD not in environ


def start_seconds(environ: Mapping[str, str]) -> float:
    """How long ranks wait for each other. ValueError where HOROVOD_START_TIMEOUT is no number of seconds."""
    given = environ.get("HOROVOD_START_TIMEOUT", str(START_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"HOROVOD_START_TIMEOUT must be a number of seconds > 0, got {given!r}")
    return seconds


def available_cores() -> int:
    """Cores that this process may use: by its affinity, or fewer where its control group has a share only."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores

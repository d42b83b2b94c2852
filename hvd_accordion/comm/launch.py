"""`init` for launchers that Horovod does not know, and an error where ranks would train alone.

Horovod knows horovodrun and the MPI that it was built with. Under any other launcher it sees one rank in each process,
and each process trains alone without a message.
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
_met: list[dict[str, str]] = []  # the variables that each `init` under such a launcher has set


def initialiser(horovod: ModuleType) -> Callable[..., None]:
    """`init` for a module that mirrors one of Horovod's."""

    def init(comm: Any = None, process_sets: Any = None) -> None:
        """Starts Horovod. Takes the same arguments as Horovod's own `init`.

        Ranks of torchrun and srun meet by Gloo. Under Open MPI, waiting threads yield their cores if a rank has fewer than
        two.

        Args:
            comm: ranks, or an mpi4py communicator; only where MPI starts the ranks.
            process_sets: a list of `hvd.ProcessSet`, or "dynamic".

        Raises:
            StartError: on each process, if a launcher started several and Horovod sees only one, or if a rank does not
                call `init` within HOROVOD_START_TIMEOUT seconds (300).
            ValueError: `comm` without MPI.
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
    """Sets the variables that Horovod reads at its start, except those that the user has set. Returns the launcher."""
    # a rendezvous server serves one start: remove the variables of the last one
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
    """True if the ranks must meet here: Horovod does not know their launcher, and the user has chosen no controller."""
    by_user = any(name in environ for name in ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_RANK", "HOROVOD_SIZE"))
    chosen = {environ.get(name, "").lower() for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")}
    # srun --mpi=pmix: Open MPI finds the others by itself
    pmix = me.launcher == "srun" and "PMIX_RANK" in environ and mpi_built and "gloo" not in chosen
    return me.size > 1 and bool(me.address) and not (by_user or pmix or "mpi" in chosen)


def yields(environ: Mapping[str, str], cores: int) -> bool:
    """True if Open MPI's waiting threads should yield: a rank has fewer than two cores, and the user has not chosen.

    A rank computes on one thread and waits on another.
    """
    ranks = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    return ranks.isdigit() and 2 * int(ranks) > cores and YIELD not in environ


def start_seconds(environ: Mapping[str, str]) -> float:
    """Seconds that ranks wait for each other. ValueError if HOROVOD_START_TIMEOUT is not a number of seconds."""
    given = environ.get("HOROVOD_START_TIMEOUT", str(START_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"HOROVOD_START_TIMEOUT must be a number of seconds > 0, got {given!r}")
    return seconds


def available_cores() -> int:
    """Cores that this process may use, by its affinity and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores

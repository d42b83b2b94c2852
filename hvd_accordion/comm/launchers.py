"""Finds launcher, rank and size of this process from the environment. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

HOROVOD = "horovodrun"


class StartError(RuntimeError):
    """Ranks did not find each other. Every rank that is present raises it, with the same reason."""


class Launched(NamedTuple):
    """One of the processes that a launcher started together."""

    launcher: str = "no launcher"
    rank: int = 0
    size: int = 1
    variable: str = ""  # that holds the size
    address: str = ""  # of rank 0's host, if Horovod does not know the launcher
    node: str = ""  # the launcher's name or number of this host
    job: str = ""  # differs between jobs on the same hosts


# Prefixes of _RANK and _SIZE. Open MPI; MPICH, Intel MPI and others; MVAPICH; jsrun
MPI = {
    "OMPI_COMM_WORLD": "Open MPI's mpirun",
    "PMI": "mpiexec",
    "MV2_COMM_WORLD": "MVAPICH's mpirun",
    "JSM_NAMESPACE": "jsrun",
}


def launched(environ: Mapping[str, str]) -> Launched:
    """The innermost launcher, if one starts another: torchrun under srun, Open MPI's mpirun in a Slurm job."""
    found = (
        _numbered(environ, HOROVOD, "HOROVOD_RANK", "HOROVOD_SIZE")
        or ("TORCHELASTIC_RUN_ID" in environ and _by_address(environ, "torchrun"))
        or _numbered(environ, MPI["OMPI_COMM_WORLD"], "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        or _by_slurm(environ)
    )
    for prefix, name in MPI.items():
        found = found or _numbered(environ, name, f"{prefix}_RANK", f"{prefix}_SIZE")
    return found or _by_address(environ, "the launcher") or Launched()


def _numbered(environ: Mapping[str, str], launcher: str, rank: str, size: str) -> Launched | None:
    numbers = environ.get(rank, ""), environ.get(size, "")
    if not all(number.isdigit() for number in numbers):
        return None
    return Launched(launcher, int(numbers[0]), int(numbers[1]), size)


def _by_address(environ: Mapping[str, str], launcher: str) -> Launched | None:
    """From torchrun's variables, which other launchers use too: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    found = _numbered(environ, launcher, "RANK", "WORLD_SIZE")
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if found is None or not (address and port):
        return None
    alone = environ.get("GROUP_WORLD_SIZE") == "1" or environ.get("LOCAL_WORLD_SIZE") == str(found.size)
    job = f"{launcher} {environ.get('TORCHELASTIC_RUN_ID', '')} {address}:{port} {found.size}"
    # torchrun numbers its agents, and a host may run two; other launchers number nothing: then the host's name is used
    node = "0" if alone else environ.get("GROUP_RANK", "")
    return found._replace(address="127.0.0.1" if alone else address, node=node, job=job)


def _by_slurm(environ: Mapping[str, str]) -> Launched | None:
    """From srun's variables. Shells of salloc and sbatch have SLURM_NTASKS too, but not SLURM_STEP_NUM_TASKS."""
    found = _numbered(environ, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    hosts = environ.get("SLURM_STEP_NODELIST", "")
    if found is None or not hosts:
        return None
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    alone = environ.get("SLURM_STEP_NUM_NODES") == "1"
    return found._replace(
        address="127.0.0.1" if alone else first_host(hosts), node=environ.get("SLURM_NODEID", ""), job=f"srun {step}"
    )


def first_host(hosts: str) -> str:
    """node03 of "node[03-05,09],login", as Slurm writes lists of hosts."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    assert first is not None
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first[0])

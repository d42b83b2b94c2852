"""What a rank finds around it: Horovod's settings, cores and threads, names of hosts. Pure but for the last functions."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence

from hvd_accordion.cli.findings import Finding, Verdict

DEFAULTS = {  # of Horovod 0.28
    "HOROVOD_CYCLE_TIME": "1",  # ms
    "HOROVOD_FUSION_THRESHOLD": "134217728",  # bytes
    "HOROVOD_CACHE_CAPACITY": "1024",  # names of tensors
}
SHOWN = (  # where they are set
    "HOROVOD_AUTOTUNE",
    "HOROVOD_DYNAMIC_PROCESS_SETS",
    "HOROVOD_HIERARCHICAL_ALLREDUCE",
    "HOROVOD_STALL_CHECK_DISABLE",
    "HOROVOD_THREAD_AFFINITY",
    "HOROVOD_TIMELINE",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CONTROLLER",
    "OMP_NUM_THREADS",
    "OMPI_MCA_mpi_yield_when_idle",
)
LONG_CYCLE = 5.0  # ms

Resolve = Callable[[str], Sequence[str]]  # a host's name -> its addresses; OSError if it has none


def variables(environ: Mapping[str, str]) -> list[Finding]:
    """Horovod's settings as far as they matter to small messages."""
    findings = [_setting(name, environ.get(name), default) for name, default in DEFAULTS.items()]
    for name in SHOWN:
        if name in environ:
            findings.append(Finding(Verdict.NOTE, name, environ[name], _ADVICE.get((name, environ[name]), "")))
    return findings


_ADVICE = {
    ("HOROVOD_STALL_CHECK_DISABLE", "1"): "ranks that wait for each other for ever will not be told of",
    ("HOROVOD_AUTOTUNE", "1"): "its trials make the first steps uneven; what it finds is for dense gradients",
    # its background loop negotiates them in every cycle, under the lock that each new collective takes
    ("HOROVOD_DYNAMIC_PROCESS_SETS", "1"): "collectives may wait for seconds: name process sets to hvd.init() instead",
}


def _setting(name: str, given: str | None, default: str) -> Finding:
    found = f"{default} (default)" if given is None else given
    try:
        value = float(default if given is None else given)
    except ValueError:
        return Finding(Verdict.BROKEN, name, found, f"must be a number; unset it for {default}")
    if not (math.isfinite(value) and value >= 0):
        return Finding(Verdict.BROKEN, name, found, f"must be a number >= 0; unset it for {default}")
    if name == "HOROVOD_CYCLE_TIME" and value > LONG_CYCLE:
        advice = "ms that each collective may wait, and PowerSGD's exchange has two in a row: set it to 1"
        return Finding(Verdict.SLOW, name, found, advice)
    if name == "HOROVOD_FUSION_THRESHOLD" and value == 0:
        return Finding(Verdict.SLOW, name, found, f"many small messages travel one by one: unset it for {default}")
    if name == "HOROVOD_CACHE_CAPACITY" and value == 0:
        return Finding(Verdict.SLOW, name, found, f"every collective is negotiated anew: unset it for {default}")
    return Finding(Verdict.OK, name, found)


def threads_of(environ: Mapping[str, str], cores: int) -> int:
    """Threads that a rank computes with: OMP_NUM_THREADS, by default one for each core."""
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) else cores


def busy(ranks: int, threads: int, cores: int, spinning: bool) -> Finding:
    """Whether a host's ranks have more busy threads than there are cores: a rank has `threads`, and Horovod's own.

    Args:
        spinning: Horovod's thread never sleeps while it waits, as Open MPI has it unless told otherwise.
    """
    subject = "threads and cores"
    found = (
        f"{ranks} rank{'s' * (ranks != 1)} of {threads} thread{'s' * (threads != 1)}, {cores} core{'s' * (cores != 1)}"
    )
    if ranks > cores and threads == 1 and not spinning:
        return Finding(Verdict.SLOW, subject, found, f"more ranks than cores: start at most {cores} on this host")
    if ranks * threads > cores and threads > 1:
        advice = f"ranks take each other's cores: OMP_NUM_THREADS={max(1, cores // ranks)}"
        return Finding(Verdict.SLOW, subject, found, advice)
    if spinning and ranks * (threads + 1) > cores:
        advice = "MPI's waiting threads take a core each: OMPI_MCA_mpi_yield_when_idle=1"
        return Finding(Verdict.SLOW, subject, found, advice)
    return Finding(Verdict.OK, subject, found)


def load(threads: float, cores: int) -> Finding:
    """Whether others leave room: threads that wanted to run in the last minute (uptime's first number)."""
    found = f"{threads:.1f} threads busy in the last minute"
    if threads >= cores:
        return Finding(
            Verdict.SLOW, "load", found, "whatever else runs here slows each rank, and all wait for the slowest"
        )
    return Finding(Verdict.OK, "load", found)


def spins(environ: Mapping[str, str]) -> bool:
    """Whether this is a rank of Open MPI that spins while it waits."""
    yields = environ.get("OMPI_MCA_mpi_yield_when_idle", "0").lower() in ("1", "true", "yes")
    return "OMPI_COMM_WORLD_SIZE" in environ and not yields


def own_name(name: str, resolve: Resolve) -> Finding:
    """Whether this host can resolve its own name."""
    problem = unresolved([name], resolve)
    if problem:
        advice = "MPI and rendezvous servers go by names: add it to /etc/hosts or to the name server"
        return Finding(Verdict.SLOW, "host", f"{name}: its name can't be resolved here", advice)
    its = dict.fromkeys(resolve(name))
    if all(address == "::1" or address.startswith("127.") for address in its):
        advice = "enough for one host; among several, its name must have an address that the others reach"
        return Finding(Verdict.NOTE, "host", f"{name} ({', '.join(its)})", advice)
    return Finding(Verdict.OK, "host", f"{name} ({', '.join(its)})")


def named_hosts(hosts: str, resolve: Resolve) -> list[Finding]:
    """Each host of horovodrun's "name:slots,name:slots"."""
    findings = []
    for name in dict.fromkeys(part.split(":")[0].strip() for part in hosts.split(",")):
        if not name:
            continue
        if unresolved([name], resolve):
            advice = "horovodrun can't reach it by this name: check the spelling, /etc/hosts and the name server"
            findings.append(Finding(Verdict.BROKEN, "host", f"{name}: its name can't be resolved here", advice))
        else:
            findings.append(Finding(Verdict.OK, "host", f"{name} ({', '.join(dict.fromkeys(resolve(name)))})"))
    return findings


def unresolved(names: Iterable[str], resolve: Resolve) -> list[str]:
    """Those of the names that have no address here."""
    missing = []
    for name in names:
        try:
            resolve(name)
        except (OSError, UnicodeError):  # the latter: no host can be called so
            missing.append(name)
    return missing


def addresses(name: str) -> list[str]:
    """Of a host, by this one's resolver. OSError if it has none."""
    return [str(where[4][0]) for where in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]

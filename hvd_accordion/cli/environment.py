"""A rank's environment: Horovod's settings, cores and threads, host names. All functions but `addresses` are pure."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence

from hvd_accordion.cli.findings import Finding, Verdict

DEFAULTS = {  # Horovod 0.28
    "HOROVOD_CYCLE_TIME": "1",  # ms
    "HOROVOD_FUSION_THRESHOLD": "134217728",  # bytes
    "HOROVOD_CACHE_CAPACITY": "1024",  # tensor names
}
SHOWN = (  # only if they are set
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

_ADVICE = {
    ("HOROVOD_STALL_CHECK_DISABLE", "1"): "Horovod will not warn of ranks that wait for each other",
    ("HOROVOD_AUTOTUNE", "1"): "its trials disturb the first steps, and it tunes for dense gradients",
    # process sets are negotiated in every cycle, under the lock that each new collective needs
    ("HOROVOD_DYNAMIC_PROCESS_SETS", "1"): "collectives may wait for seconds: pass process sets to hvd.init() instead",
}

Resolve = Callable[[str], Sequence[str]]  # returns the addresses of a host name; raises OSError if it has none


def variables(environ: Mapping[str, str]) -> list[Finding]:
    """Judges those settings of Horovod that affect small messages."""
    findings = [_setting(name, environ.get(name), default) for name, default in DEFAULTS.items()]
    for name in SHOWN:
        if name in environ:
            findings.append(Finding(Verdict.NOTE, name, environ[name], _ADVICE.get((name, environ[name]), "")))
    return findings


def _setting(name: str, given: str | None, default: str) -> Finding:
    found = f"{default} (default)" if given is None else given
    try:
        value = float(default if given is None else given)
    except ValueError:
        return Finding(Verdict.BROKEN, name, found, f"must be a number; unset it for {default}")
    if not (math.isfinite(value) and value >= 0):
        return Finding(Verdict.BROKEN, name, found, f"must be a number >= 0; unset it for {default}")
    if name == "HOROVOD_CYCLE_TIME" and value > LONG_CYCLE:
        advice = "each collective may wait this long (ms), and PowerSGD has two in sequence: set it to 1"
        return Finding(Verdict.SLOW, name, found, advice)
    if name == "HOROVOD_FUSION_THRESHOLD" and value == 0:
        return Finding(Verdict.SLOW, name, found, f"small messages are not fused: unset it for {default}")
    if name == "HOROVOD_CACHE_CAPACITY" and value == 0:
        return Finding(Verdict.SLOW, name, found, f"every collective is negotiated again: unset it for {default}")
    return Finding(Verdict.OK, name, found)


def threads_of(environ: Mapping[str, str], cores: int) -> int:
    """Returns the threads that a rank computes with: OMP_NUM_THREADS, by default one per core."""
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) else cores


def busy(ranks: int, threads: int, cores: int, spinning: bool) -> Finding:
    """Judges whether the ranks of a host have more busy threads than cores.

    Args:
        ranks: number of ranks on the host.
        threads: computing threads of a rank. Horovod's background thread comes in addition.
        cores: of the host.
        spinning: Horovod's thread polls while it waits, which is Open MPI's default.
    """
    subject = "threads and cores"
    found = (
        f"{ranks} rank{'s' * (ranks != 1)} of {threads} thread{'s' * (threads != 1)}, {cores} core{'s' * (cores != 1)}"
    )
    if ranks > cores and threads == 1 and not spinning:
        return Finding(Verdict.SLOW, subject, found, f"more ranks than cores: start at most {cores} on this host")
    if ranks * threads > cores and threads > 1:
        advice = f"ranks compete for cores: set OMP_NUM_THREADS={max(1, cores // ranks)}"
        return Finding(Verdict.SLOW, subject, found, advice)
    if spinning and ranks * (threads + 1) > cores:
        advice = "waiting MPI threads occupy a core each: set OMPI_MCA_mpi_yield_when_idle=1"
        return Finding(Verdict.SLOW, subject, found, advice)
    return Finding(Verdict.OK, subject, found)


def load(threads: float, cores: int) -> Finding:
    """Judges the load by other processes: runnable threads in the last minute (the first number of `uptime`)."""
    found = f"{threads:.1f} threads busy in the last minute"
    if threads >= cores:
        return Finding(
            Verdict.SLOW, "load", found, "other processes slow a rank down, and all ranks wait for the slowest"
        )
    return Finding(Verdict.OK, "load", found)


def spins(environ: Mapping[str, str]) -> bool:
    """Returns whether this is a rank of Open MPI that polls while it waits."""
    yields = environ.get("OMPI_MCA_mpi_yield_when_idle", "0").lower() in ("1", "true", "yes")
    return "OMPI_COMM_WORLD_SIZE" in environ and not yields


def own_name(name: str, resolve: Resolve) -> Finding:
    """Checks whether this host can resolve its own name."""
    problem = unresolved([name], resolve)
    if problem:
        advice = "MPI and rendezvous servers use host names: add it to /etc/hosts or to the name server"
        return Finding(Verdict.SLOW, "host", f"{name}: the name cannot be resolved here", advice)
    found = dict.fromkeys(resolve(name))
    if all(address == "::1" or address.startswith("127.") for address in found):
        advice = "sufficient on one host; with several, the name must resolve to an address that the others reach"
        return Finding(Verdict.NOTE, "host", f"{name} ({', '.join(found)})", advice)
    return Finding(Verdict.OK, "host", f"{name} ({', '.join(found)})")


def named_hosts(hosts: str, resolve: Resolve) -> list[Finding]:
    """Checks each host of horovodrun's "name:slots,name:slots"."""
    findings = []
    for name in dict.fromkeys(part.split(":")[0].strip() for part in hosts.split(",")):
        if not name:
            continue
        if unresolved([name], resolve):
            advice = "horovodrun cannot reach it by this name: check the spelling, /etc/hosts and the name server"
            findings.append(Finding(Verdict.BROKEN, "host", f"{name}: the name cannot be resolved here", advice))
        else:
            findings.append(Finding(Verdict.OK, "host", f"{name} ({', '.join(dict.fromkeys(resolve(name)))})"))
    return findings


def unresolved(names: Iterable[str], resolve: Resolve) -> list[str]:
    """Returns the names that have no address here."""
    missing = []
    for name in names:
        try:
            resolve(name)
        except (OSError, UnicodeError):  # UnicodeError: not a valid host name
            missing.append(name)
    return missing


def addresses(name: str) -> list[str]:
    """Returns the addresses of a host.

    Raises:
        OSError: it has none.
    """
    return [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]

"""What ranks learn of each other: versions and hosts of all, and the link between them. By torch or by TensorFlow."""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hvd_accordion.cli import environment, software
from hvd_accordion.cli.findings import Finding, Verdict
from hvd_accordion.cli.reference_model import Choices
from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.comm.launch import available_cores
from hvd_accordion.policy.assignment import Layer
from hvd_accordion.policy.auto import Calibration
from hvd_accordion.policy.cost_model import constant

NAME = "hvd_accordion.check"  # what the names of its collectives begin with
SLOW_COLLECTIVE = 5e-3  # seconds that the smallest takes


class Rank(NamedTuple):
    """What a rank tells of itself."""

    host: str
    cores: int
    threads: int
    spinning: bool
    versions: Mapping[str, str]
    settings: Mapping[str, str]


class Seen(NamedTuple):
    """What all ranks told, the names that each of them could not resolve, and the link."""

    ranks: Sequence[Rank]
    unresolved: Sequence[Sequence[str]]
    measured: Calibration


def myself() -> Rank:
    cores = available_cores()
    return Rank(
        socket.gethostname(),
        cores,
        environment.threads_of(os.environ, cores),
        environment.spins(os.environ),
        software.installed_versions(),
        {name: os.environ.get(name, default) for name, default in environment.DEFAULTS.items()},
    )


def look_around(framework: str, layers: Sequence[Layer], choices: Choices) -> Seen:
    """Starts Horovod, compares and measures, and stops it again; every rank must come here.

    Raises ImportError where Horovod's extension does not fit, StartError where ranks don't find each other,
    whatever Horovod raises where another rank fails.
    """
    hvd = importlib.import_module(f"hvd_accordion.{framework}")
    agreement = importlib.import_module(f"hvd_accordion.{framework}.exchange.agreement")
    hvd.init()
    try:
        everyone = hvd.global_process_set

        def told(what: Any, name: str) -> list[Any]:
            texts = agreement.gather(json.dumps(what).encode(), f"{NAME}.{name}", everyone)
            return [json.loads(text) for text in texts]

        ranks = [Rank(*its) for its in told(myself(), "ranks")]
        others = sorted({its.host for its in ranks})
        unresolved = told(environment.unresolved(others, environment.addresses), "unresolved")
        probe = importlib.import_module(f"hvd_accordion.{framework}.exchange.calibration")
        if framework == "torch":
            measured = probe.Probe(everyone, NAME).measure(layers, choices)
        else:
            measured = probe.measured(layers, choices, NAME, everyone)
        return Seen(ranks, unresolved, measured)
    finally:
        hvd.shutdown()


def together(seen: Seen) -> list[Finding]:
    """Whether the ranks have the same software and settings, resolve each other's names, and leave each other cores."""
    findings = _differences(seen.ranks)
    for host in dict.fromkeys(rank.host for rank in seen.ranks):
        here = [rank for rank in seen.ranks if rank.host == host]
        findings.append(Finding(Verdict.NOTE, "host", f"{host}: {len(here)} of {len(seen.ranks)} ranks"))
        most = max(rank.threads for rank in here)
        findings.append(environment.busy(len(here), most, here[0].cores, any(rank.spinning for rank in here)))
        blind = sorted({rank.host for rank, names in zip(seen.ranks, seen.unresolved, strict=True) if host in names})
        if blind:
            found = f"{host}: its name can't be resolved on {', '.join(blind)}"
            advice = (
                "these ranks found each other by addresses; horovodrun and torch's DDP go by names: mend /etc/hosts"
            )
            findings.append(Finding(Verdict.SLOW, "host", found, advice))
    return findings


def _differences(ranks: Sequence[Rank]) -> list[Finding]:
    findings = []
    for name in dict.fromkeys(name for rank in ranks for name in rank.versions):
        if len({rank.versions.get(name) for rank in ranks}) > 1:
            found = _each(ranks, [rank.versions.get(name, "none") for rank in ranks])
            if name in ("hvd_accordion", "horovod", "torch", "tensorflow"):
                advice = "install the same everywhere: ranks that compare their versions refuse to train together"
                findings.append(Finding(Verdict.BROKEN, name, found, advice))
            else:
                findings.append(Finding(Verdict.NOTE, name, found))
    for name in environment.DEFAULTS:
        if len({rank.settings[name] for rank in ranks}) > 1:
            found = _each(ranks, [rank.settings[name] for rank in ranks])
            findings.append(Finding(Verdict.SLOW, name, found, "set it alike on all ranks: horovodrun hands it on"))
    return findings or [Finding(Verdict.OK, "ranks", f"the same versions and settings on all {len(ranks)}")]


def _each(ranks: Sequence[Rank], values: Sequence[str]) -> str:
    """ "2.1 on rank 0 (a), 2.2 on rank 1 (b)" of the first rank of each value."""
    first: dict[str, int] = {}
    for i, value in enumerate(values):
        first.setdefault(value, i)
    return ", ".join(f"{value} on rank {i} ({ranks[i].host})" for value, i in first.items())


def link(measured: Calibration, framework: str) -> Finding:
    """The link in words: megabits a second that a rank sends, and what the smallest collective takes."""
    its, n = measured.link, measured.world_size
    alone = constant(AllReduce, n, its)
    speed = f"{8e-6 * its.bandwidth:,.0f} Mbit/s" if math.isfinite(its.bandwidth) else "too fast to be told"
    found = f"{speed}, {1e3 * alone:.2f} ms a collective, {n} ranks, by {framework}"
    if alone > SLOW_COLLECTIVE:
        advice = "every collective waits for so long: HOROVOD_CYCLE_TIME=1, fewer busy threads than cores"
        return Finding(Verdict.SLOW, "link", found, advice)
    return Finding(Verdict.OK, "link", found)

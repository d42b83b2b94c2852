"""Collects the versions and hosts of all ranks and measures the link between them, by torch or TensorFlow."""

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
from hvd_accordion.policy.auto import Calibration
from hvd_accordion.policy.cost_model import constant
from hvd_accordion.policy.layers import Layer

NAME = "hvd_accordion.check"  # prefix of the names of its collectives
SLOW_COLLECTIVE = 5e-3  # seconds of the smallest collective


class Rank(NamedTuple):
    """The environment of one rank."""

    host: str
    cores: int
    threads: int
    spinning: bool
    versions: Mapping[str, str]
    settings: Mapping[str, str]


class Survey(NamedTuple):
    """The environments of all ranks, the host names that each could not resolve, and the measured link."""

    ranks: Sequence[Rank]
    unresolved: Sequence[Sequence[str]]
    measured: Calibration


def this_rank() -> Rank:
    """Returns the environment of this rank."""
    cores = available_cores()
    return Rank(
        socket.gethostname(),
        cores,
        environment.threads_of(os.environ, cores),
        environment.spins(os.environ),
        software.installed_versions(),
        {name: os.environ.get(name, default) for name, default in environment.DEFAULTS.items()},
    )


def survey(framework: str, layers: Sequence[Layer], choices: Choices) -> Survey:
    """Starts Horovod, collects and measures, and shuts Horovod down. Every rank must call it.

    Args:
        framework: "torch" or "tensorflow".
        layers: of the network to measure compression for.
        choices: layer name -> specs to measure.

    Raises:
        ImportError: Horovod's extension does not fit the framework.
        StartError: the ranks do not find each other.
        Exception: another rank fails; the class depends on Horovod.
    """
    hvd = importlib.import_module(f"hvd_accordion.{framework}")
    agreement = importlib.import_module(f"hvd_accordion.{framework}.exchange.agreement")
    hvd.init()
    try:
        transport = importlib.import_module(f"hvd_accordion.{framework}.transport")
        everyone = transport.connect(hvd.global_process_set)

        def gather(value: Any, name: str) -> list[Any]:
            texts = agreement.gather(json.dumps(value).encode(), f"{NAME}.{name}", everyone)
            return [json.loads(text) for text in texts]

        ranks = [Rank(*fields) for fields in gather(this_rank(), "ranks")]
        hosts = sorted({rank.host for rank in ranks})
        unresolved = gather(environment.unresolved(hosts, environment.addresses), "unresolved")
        probe = importlib.import_module(f"hvd_accordion.{framework}.exchange.calibration")
        if framework == "torch":
            measured = probe.Probe(everyone, NAME).measure(layers, choices)
        else:
            measured = probe.measured(layers, choices, NAME, everyone)
        return Survey(ranks, unresolved, measured)
    finally:
        hvd.shutdown()


def compare(survey: Survey) -> list[Finding]:
    """Checks that ranks have the same software and settings, resolve each other's names, and have enough cores."""
    findings = _differences(survey.ranks)
    for host in dict.fromkeys(rank.host for rank in survey.ranks):
        ranks = [rank for rank in survey.ranks if rank.host == host]
        findings.append(Finding(Verdict.NOTE, "host", f"{host}: {len(ranks)} of {len(survey.ranks)} ranks"))
        threads = max(rank.threads for rank in ranks)
        findings.append(environment.busy(len(ranks), threads, ranks[0].cores, any(rank.spinning for rank in ranks)))
        failing = sorted({r.host for r, names in zip(survey.ranks, survey.unresolved, strict=True) if host in names})
        if failing:
            found = f"{host}: the name cannot be resolved on {', '.join(failing)}"
            advice = "these ranks used addresses; horovodrun and torch's DDP use host names: correct /etc/hosts"
            findings.append(Finding(Verdict.SLOW, "host", found, advice))
    return findings


def _differences(ranks: Sequence[Rank]) -> list[Finding]:
    findings = []
    for name in dict.fromkeys(name for rank in ranks for name in rank.versions):
        if len({rank.versions.get(name) for rank in ranks}) > 1:
            found = _by_value(ranks, [rank.versions.get(name, "none") for rank in ranks])
            if name in ("hvd_accordion", "horovod", "torch", "tensorflow"):
                advice = "install the same version on all hosts: ranks with different versions refuse to train"
                findings.append(Finding(Verdict.BROKEN, name, found, advice))
            else:
                findings.append(Finding(Verdict.NOTE, name, found))
    for name in environment.DEFAULTS:
        if len({rank.settings[name] for rank in ranks}) > 1:
            found = _by_value(ranks, [rank.settings[name] for rank in ranks])
            findings.append(
                Finding(Verdict.SLOW, name, found, "set the same value on all ranks: horovodrun passes it on")
            )
    return findings or [Finding(Verdict.OK, "ranks", f"the same versions and settings on all {len(ranks)} ranks")]


def _by_value(ranks: Sequence[Rank], values: Sequence[str]) -> str:
    """Formats each value with its first rank: "2.1 on rank 0 (a), 2.2 on rank 1 (b)"."""
    first: dict[str, int] = {}
    for i, value in enumerate(values):
        first.setdefault(value, i)
    return ", ".join(f"{value} on rank {i} ({ranks[i].host})" for value, i in first.items())


def link(measured: Calibration, framework: str) -> Finding:
    """Reports the bandwidth of a rank in Mbit/s and the latency of the smallest collective."""
    link, n = measured.link, measured.world_size
    latency = constant(AllReduce, n, link)
    speed = f"{8e-6 * link.bandwidth:,.0f} Mbit/s" if math.isfinite(link.bandwidth) else "bandwidth too high to measure"
    found = f"{speed}, {1e3 * latency:.2f} ms per collective, {n} ranks, by {framework}"
    if latency > SLOW_COLLECTIVE:
        advice = "every collective waits this long: set HOROVOD_CYCLE_TIME=1, use fewer busy threads than cores"
        return Finding(Verdict.SLOW, "link", found, advice)
    return Finding(Verdict.OK, "link", found)

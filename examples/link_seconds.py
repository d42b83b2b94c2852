"""Seconds of trainings over links: measured, or predicted from trainings on this machine. Numbers in, numbers out.

A trial is a training's result: `points` (pairs of bytes sent and quality), `clock` (seconds of training at each point),
`steps`, `ranks` and `link`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.policy.cost_model import Link, seconds

LOCAL = "this machine"
LINKS: dict[str, float | None] = {LOCAL: None, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8}  # bits a second
LATENCY = 50e-6  # seconds a hop, assumed where nothing was measured

Trials = Sequence[Mapping[str, Any]]  # of one method, one for each seed


class Clock(NamedTuple):
    """Seconds of training at each point."""

    seconds: list[float]
    measured: bool

    def __str__(self) -> str:
        """The last of them; `~` marks a prediction."""
        return f"{'' if self.measured else '~'}{self.seconds[-1]:.1f}"


def clock(trials: Trials, link: str) -> Clock:
    """The mean over the trials on this link; if there is none, the prediction from those on this machine."""
    measured = [trial["clock"] for trial in trials if trial["link"] == link]
    if measured:
        return Clock([statistics.fmean(point) for point in zip(*measured, strict=True)], True)
    local = [predicted(trial, link) for trial in trials if trial["link"] == LOCAL]
    return Clock([statistics.fmean(point) for point in zip(*local, strict=True)], False)


def predicted(trial: Mapping[str, Any], link: str) -> list[float]:
    """Seconds on this machine plus one allreduce a step with the bytes of a mean step, by the package's cost model.

    It assumes the link's full rate, and that nothing travels during backward.
    """
    ranks, rate = trial["ranks"], LINKS[link]
    assert rate is not None and ranks > 1
    joined = Link(LATENCY, rate / 8)
    found = []
    for point, ((sent, _), local) in enumerate(zip(trial["points"], trial["clock"], strict=True), 1):
        steps = point * trial["steps"] / len(trial["points"])
        payload = sent / steps / (2 * (ranks - 1) / ranks)
        found.append(local + steps * seconds(AllReduce, payload, ranks, joined))
    return found


def mean(trials: Trials, key: str) -> float:
    return statistics.fmean(trial[key] for trial in trials)


def notes(results: Mapping[str, Trials], unit: str) -> str:
    """The lines below a table: how much was trained in `unit` ("epochs"), the seeds, how the seconds were found."""
    trials = next(iter(results.values()))
    seeds = ", ".join(f"{trial['seed']} ({trial['link']})" for trial in trials)
    text = f"{trials[0][unit]} {unit}, {trials[0]['ranks']} ranks; seeds and where they trained: {seeds}."
    if any(not clock(trials, link).measured for link in LINKS):
        text += "\n~: predicted by the cost model (latency + bytes / bandwidth, none of it hidden behind backward)."
    return text

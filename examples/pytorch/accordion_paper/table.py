"""Results of the trainings: means and spreads over seeds, the paper's table, and whether the goals are met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from accordion_paper.experiments import Experiment, Run

TITLES = {"relaxed": "relaxed only", "critical": "critical only", "accordion": "**Accordion**", "dense": "dense"}
BATCHES = {"relaxed": "large only", "critical": "small only", "accordion": "**Accordion**"}
GOALS = {"powersgd": 1.5, "topk": 1.5, "batch": 3.0}  # minimal reduction of traffic relative to the critical level


class Cell(NamedTuple):
    """One experiment in one mode: means over seeds. `spread` is the standard deviation, NaN for one seed."""

    seeds: int
    value: float
    spread: float
    floats: float
    sent_bytes: float
    seconds: float
    critical: float


class Verdict(NamedTuple):
    """Accordion compared with the critical level. Unknown (NaN) values count as not met."""

    less: float  # reduction of bytes
    sends_less: bool
    behind: float  # how much worse the mean is, in units of the metric; negative if better
    holds: bool


Cells = dict[tuple[str, str], Cell]  # by experiment and mode


def cells(results: Mapping[Run, Mapping[str, Any]]) -> Cells:
    by_mode: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run, result in results.items():
        by_mode.setdefault((run.experiment.name, run.mode), []).append(result)
    return {key: cell(of_seeds) for key, of_seeds in by_mode.items()}


def cell(results: Sequence[Mapping[str, Any]]) -> Cell:
    def mean(key: str) -> float:
        return statistics.fmean(result[key] for result in results)

    values = [result["value"] for result in results]
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    numbers = map(mean, ("floats", "sent_bytes", "seconds", "critical_fraction"))
    return Cell(len(values), mean("value"), spread, *numbers)


def verdict(experiment: Experiment, accordion: Cell, critical: Cell) -> Verdict:
    """Whether Accordion is worse by at most its own spread, and reduces the traffic by the goal."""
    worse = accordion.value - critical.value
    behind = worse if experiment.metric == "perplexity" else -worse
    less = critical.sent_bytes / accordion.sent_bytes if accordion.sent_bytes else math.nan
    return Verdict(less, less >= GOALS[experiment.family], behind, behind <= accordion.spread)


def markdown(found: Cells, experiments: Sequence[Experiment]) -> str:
    """Formats the Markdown table and a summary line per experiment."""
    head = [
        "data, model",
        "levels",
        "mode",
        "result",
        "paper",
        "floats, M",
        "paper, M",
        "MB sent",
        "times less",
        "critical",
        "seconds",
    ]
    rows = [head]
    for experiment in experiments:
        for mode in TITLES:
            if (experiment.name, mode) in found:
                base = found.get((experiment.name, "critical"))
                rows.append(row(experiment, mode, found[experiment.name, mode], base))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * w if i < 3 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    aligned = [[r[i].ljust(w) if i < 3 else r[i].rjust(w) for i, w in enumerate(widths)] for r in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in aligned]
    said = [said for experiment in experiments if (said := sentence(experiment, found))]
    return "\n".join([*lines, *([""] if said else []), *said])


def row(experiment: Experiment, mode: str, cell: Cell, critical: Cell | None) -> list[str]:
    titles = BATCHES if experiment.family == "batch" else TITLES
    reference, floats = experiment.reference.get(mode), experiment.floats.get(mode)
    less = critical.sent_bytes / cell.sent_bytes if critical and cell.sent_bytes else math.nan
    return [
        f"{experiment.data}, {experiment.model}",
        experiment.levels(),
        titles[mode],
        measured(experiment, cell),
        "" if reference is None else f"{reference:.2f}",
        number(cell.floats / 1e6),
        number(floats),
        number(cell.sent_bytes / 1e6),
        number(less),
        f"{cell.critical:.0%}" if mode == "accordion" else "",
        number(cell.seconds),
    ]


def measured(experiment: Experiment, cell: Cell) -> str:
    unit = "%" if experiment.metric == "accuracy" else "ppl"
    spread = "" if math.isnan(cell.spread) else f" ± {cell.spread:.2f}"
    return f"{cell.value:.2f}{spread} {unit}"


def number(value: float | None) -> str:
    """Formats with at least three digits; empty if unknown."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.{2 if abs(value) < 10 else 1}f}"


def sentence(experiment: Experiment, found: Cells) -> str:
    """Formats one line of Markdown; empty while one of the two trainings is missing."""
    accordion, critical = (found.get((experiment.name, mode)) for mode in ("accordion", "critical"))
    if accordion is None or critical is None:
        return ""
    seen = verdict(experiment, accordion, critical)
    goal = GOALS[experiment.family]
    against = f"Accordion {measured(experiment, accordion)}, critical only {measured(experiment, critical)}"
    one = min(accordion.seeds, critical.seeds) == 1
    held = (
        "one seed has no spread" if one else "within its spread" if seen.holds else "**worse by more than its spread**"
    )
    sent = f"{seen.less:.2f} times less sent, {'at least' if seen.sends_less else '**not**'} {goal:g} times"
    return f"* {experiment.name}: {against}: {held}; {sent}."

"""Plots the trainings: result over traffic, a panel per experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from accordion_paper.experiments import Experiment, Run
from accordion_paper.table import BATCHES, TITLES
from hvd_accordion.tracking.figures import LINES


def curves(results: Mapping[Run, Mapping[str, Any]], experiments: Sequence[Experiment]) -> Figure:
    """Draws a line per training, by epoch, over the MB that one rank has sent, with a colour per mode."""
    shown = [e for e in experiments if any(run.experiment.name == e.name for run in results)]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    for place, experiment in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        titles = BATCHES if experiment.family == "batch" else TITLES
        for mode, colour in zip(TITLES, LINES, strict=False):
            label = titles.get(mode, mode).strip("*")
            for run, result in results.items():
                if run.experiment.name == experiment.name and run.mode == mode:
                    sent = [epoch["sent_bytes"] / 1e6 for epoch in result["history"]]
                    values = [epoch["value"] for epoch in result["history"]]
                    axes.plot(sent, values, color=colour, linewidth=1.2, alpha=0.8, label=label)
                    label = "_"  # one legend entry for all seeds
        axes.set_xscale("log")
        if experiment.metric == "perplexity":
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis)[: 1 + (experiment.metric == "perplexity")]:
            axis.set_major_formatter(LogFormatter(minor_thresholds=(3, 1)))  # 0.5 and 200, not powers of ten
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 1)))
        unit = "test accuracy, %" if experiment.metric == "accuracy" else "perplexity"
        axes.set(title=f"{experiment.data}, {experiment.model}, {experiment.levels()}", xlabel="MB sent", ylabel=unit)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    return figure

"""The demo's results: the table, the picture. Numbers in, Markdown and a matplotlib figure out."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from link_seconds import LINKS, Trials, clock, mean
from markdown_table import markdown
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from hvd_accordion.tracking.figures import CRITICAL, RELAXED

COLOURS = ("#000000", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's, for the colour-blind
MARKERS = ("s", "v", "^", "o")


def table(results: Mapping[str, Trials]) -> str:
    """In Markdown, aligned. `~` marks seconds that were predicted."""
    head = ["compression", "test accuracy", "MB sent per rank", "times less"]
    rows = [[*head, *(f"s, {link}" for link in LINKS)]]
    for name, trials in results.items():
        less = mean(trials, "dense_bytes") / mean(trials, "sent_bytes")
        cells = [name, spread(trials), f"{mean(trials, 'sent_bytes') / 1e6:,.1f}", f"{less:,.1f}"]
        rows.append([*cells, *(str(clock(trials, link)) for link in LINKS)])
    return markdown(rows)


def spread(trials: Trials) -> str:
    """Mean accuracy, and the lowest and highest of several seeds."""
    values = [trial["accuracy"] for trial in trials]
    several = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1%}{several}"


def draw(results: Mapping[str, Trials]) -> Figure:
    """Accuracy over bytes, which layer was critical when, and accuracy over the seconds of both links."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    (sent, regimes), (fast, slow) = figure.subplots(2, 2)
    for i, (name, trials) in enumerate(results.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        megabytes = [statistics.fmean(x[0] for x in epoch) / 1e6 for epoch in zip(*curves(trials), strict=True)]
        curve(sent, megabytes, trials, style)
        for axes, link in ((fast, "1 Gbit/s"), (slow, "100 Mbit/s")):
            curve(axes, clock(trials, link).seconds, trials, style)
    sent.set(xlabel="MB sent per rank", title="What it costs in bytes")
    for axes, link in ((fast, "1 Gbit/s"), (slow, "100 Mbit/s")):
        how = "measured" if all(clock(trials, link).measured for trials in results.values()) else "predicted"
        axes.set(xlabel=f"seconds of training over {link}, {how}", title=f"What it costs in time, {link}")
    for axes in (sent, fast, slow):
        axes.set(xscale="log", ylabel="test accuracy", ylim=(0.55, 1.0))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    adaptive = [trials[0] for trials in results.values() if any(trials[0]["regimes"])]
    heat_map(regimes, adaptive[0]["regimes"] if adaptive else [], f"seed {adaptive[0]['seed']}" if adaptive else "")
    figure.legend(*sent.get_legend_handles_labels(), loc="outside lower center", ncols=len(results), frameon=False)
    return figure


def curves(trials: Trials) -> list[list[list[float]]]:
    """For each trial its points by epoch: bytes sent, accuracy."""
    return [trial["points"] for trial in trials]


def curve(axes: Axes, x: Sequence[float], trials: Trials, style: Mapping[str, Any]) -> None:
    """The mean accuracy of the seeds by epoch, in a band from the lowest to the highest."""
    by_epoch = [[point[1] for point in epoch] for epoch in zip(*curves(trials), strict=True)]
    axes.fill_between(x, [*map(min, by_epoch)], [*map(max, by_epoch)], color=style["color"], alpha=0.15, linewidth=0)
    means = [*map(statistics.fmean, by_epoch)]
    axes.plot(x, means, markersize=4, linewidth=1.6, markeredgecolor="white", markeredgewidth=0.4, **style)


def heat_map(axes: Axes, regimes: Sequence[Mapping[str, str]], which: str) -> None:
    """A row for each layer, a column for each epoch."""
    layers = list(dict.fromkeys(layer for epoch in regimes for layer in epoch))
    if not layers:
        axes.set_axis_off()
        return
    cells = [[float(epoch.get(layer) == "critical") for epoch in regimes] for layer in layers]
    axes.imshow(cells, cmap=ListedColormap([RELAXED, CRITICAL]), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.xaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(len(regimes) - 1)]))
    axes.yaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(len(layers) - 1)]))
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(0, len(regimes), 4))
    axes.set_yticks(range(len(layers)), [layer_name(layer) for layer in layers])
    axes.set_xlabel("epoch")
    axes.set_title(f"Accordion's levels, {which}", pad=26)
    names = (("critical: PowerSGD(4)", CRITICAL), ("relaxed: PowerSGD(1)", RELAXED))
    patches = [Patch(color=colour, label=name) for name, colour in names]
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def layer_name(variable: str) -> str:
    """Of "conv1.weight" (torch) or "sequential/conv1/kernel" (Keras): "conv1"."""
    return re.split(r"[./]", variable)[-2]

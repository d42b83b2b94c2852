"""The comparison's results: table, picture, seconds to dense training's loss. Numbers in, Markdown and a figure out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from link_seconds import LINKS, LOCAL, Trials, clock, mean
from markdown_table import markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from language_model.methods import DENSE, METHODS

REMOTE = [link for link in LINKS if link != LOCAL]
# Okabe and Ito's, for the colour-blind
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = "os^vDPX*"


def table(results: Mapping[str, Trials]) -> str:
    """A row for each method. `~` marks seconds that were predicted, `-` a loss that was not reached."""
    seconds = [head for link in REMOTE for head in (f"s, {link}", f"s to dense AdamW's loss, {link}")]
    rows = [["method", "validation loss", "MB sent per rank", "times less", f"s, {LOCAL}", *seconds]]
    target = mean(results[DENSE], "validation_loss") if DENSE in results else None
    for name, trials in results.items():
        less = mean(trials, "dense_bytes") / mean(trials, "sent_bytes")
        cells = [str(METHODS[name]), spread(trials), f"{mean(trials, 'sent_bytes') / 1e6:,.2f}", f"{less:,.1f}"]
        cells.append(str(clock(trials, LOCAL)))
        for link in REMOTE:
            cells += [str(clock(trials, link)), until(trials, link, target)]
        rows.append(cells)
    return markdown(rows)


def spread(trials: Trials) -> str:
    """Mean loss, and the lowest and highest of several seeds."""
    values = [trial["validation_loss"] for trial in trials]
    several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{several}"


def until(trials: Trials, link: str, target: float | None) -> str:
    """Seconds over a link until the mean loss of the seeds is at most `target`; the first point there counts."""
    when = None if target is None else reached(clock(trials, link).seconds, losses(trials), target)
    return "-" if when is None else f"{when:.1f}"


def reached(seconds: Sequence[float], values: Sequence[float], target: float) -> float | None:
    return next((when for when, loss in zip(seconds, values, strict=True) if loss <= target), None)


def losses(trials: Trials) -> list[float]:
    """The mean loss of the seeds at each point."""
    return [statistics.fmean(loss for _, loss in point) for point in zip(*(t["points"] for t in trials), strict=True)]


def draw(results: Mapping[str, Trials]) -> Figure:
    """Loss over bytes, and over the seconds of both links; Muon solid, others dashed."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    sent, *timed = figure.subplots(1, 1 + len(REMOTE))
    counts = {"solid": -1, "dashed": -1}
    for name, trials in results.items():
        line = "solid" if METHODS[name].optimizer == "Muon" else "dashed"
        counts[line] += 1
        i = counts[line]
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": line,
            "label": str(METHODS[name]),
        }
        by_point = zip(*(trial["points"] for trial in trials), strict=True)
        curve(sent, [statistics.fmean(sent for sent, _ in point) / 1e6 for point in by_point], trials, style)
        for axes, link in zip(timed, REMOTE, strict=True):
            curve(axes, clock(trials, link).seconds, trials, style)
    sent.set(xlabel="MB sent per rank", title="What it costs in bytes")
    for axes, link in zip(timed, REMOTE, strict=True):
        how = "measured" if all(clock(trials, link).measured for trials in results.values()) else "predicted"
        axes.set(xlabel=f"seconds of training over {link}, {how}", title=f"What it costs in time, {link}")
    for axes in (sent, *timed):
        axes.set(xscale="log", ylabel="validation loss, nats a character")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is not sent else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*sent.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def curve(axes: Axes, x: Sequence[float], trials: Trials, style: Mapping[str, str]) -> None:
    """The mean loss of the seeds by point, in a band from the lowest to the highest."""
    by_point = [[loss for _, loss in point] for point in zip(*(trial["points"] for trial in trials), strict=True)]
    axes.fill_between(x, [*map(min, by_point)], [*map(max, by_point)], color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(x, losses(trials), markersize=3.5, linewidth=1.3, markeredgewidth=0, **style)  # type: ignore[arg-type]

"""Shows the results of links.py as a Markdown table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from models import BATCHES
from modes import ALONE, DDP_POWERSGD, HOROVOD, MODES

REFERENCES = (HOROVOD, DDP_POWERSGD, ALONE)
# by family; markers differ within a family. The Okabe-Ito palette suits all kinds of colour blindness
COLOURS = {"alone": "#8C8C8C", "horovod": "#000000", "ddp": "#E69F00", "ours": "#0072B2", "auto": "#D55E00"}
MARKERS = "osD^vPX*"


def rows(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each mode its medians, and the medians of its ratios to the references' turns of the same round."""
    by_mode: dict[str, dict[int, dict[str, Any]]] = {}
    for turn in turns:
        by_mode.setdefault(turn["mode"], {})[turn["round"]] = turn
    made = []
    for mode in filter(by_mode.__contains__, MODES):
        mine = by_mode[mode]
        row = {"mode": mode, "turns": len(mine)}
        row |= {key: statistics.median(turn[key] for turn in mine.values()) for key in ("seconds", "sent")}
        for reference in REFERENCES:
            theirs = by_mode.get(reference, {})
            ratios = [mine[i]["seconds"] / theirs[i]["seconds"] for i in mine.keys() & theirs.keys()]
            row[reference] = statistics.median(ratios) if ratios else None
        made.append(row)
    return made


def table(part: dict[str, Any]) -> str:
    """Formats the results of a model for one number of hosts and one link."""
    title = f"**{part['model']}**, batch {BATCHES[part['model']]}, {part['hosts']} hosts, {part['link']}"
    cells = [["mode", "ms a step", *(f"of {name}" for name in REFERENCES), "MB left a host per step", "turns"]]
    for row in rows(part["turns"]):
        ratios = ["" if row[name] is None else f"{row[name]:.3f}" for name in REFERENCES]
        cells.append(
            [row["mode"], f"{1e3 * row['seconds']:,.1f}", *ratios, f"{row['sent'] / 1e6:.2f}", str(row["turns"])]
        )
    few = "Modes with fewer turns than others are too slow for more; their ratios are of the rounds that they shared."
    slow = len({line[-1] for line in cells[1:]}) > 1
    return "\n\n".join([title, markdown(cells), *([few] if slow else [])])


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Formats an aligned Markdown table whose first row is the header."""
    first, *others = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [[row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))] for row in cells]
    lines.insert(1, ["-" * first, *("-" * (w - 1) + ":" for w in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(measured: Sequence[dict[str, Any]]) -> Figure:
    """Plots the step time by link, with a column of panels per model and a row per number of hosts."""
    models = list(dict.fromkeys(part["model"] for part in measured))
    counts = list(dict.fromkeys(part["hosts"] for part in measured))
    links = list(dict.fromkeys(part["link"] for part in measured))
    figure = Figure(figsize=(2.6 + 3.6 * len(models), 1.6 + 3.2 * len(counts)), layout="constrained")
    grid = figure.subplots(len(counts), len(models), sharex=True, sharey="col", squeeze=False)
    lines = {}
    for part in measured:
        axes = grid[counts.index(part["hosts"])][models.index(part["model"])]
        axes.set(title=f"{part['model']}, {part['hosts']} hosts", yscale="log")
    for (model, count), parts in grouped(measured).items():
        axes = grid[counts.index(count)][models.index(model)]
        found = {part["link"]: {row["mode"]: row["seconds"] for row in rows(part["turns"])} for part in parts}
        for mode in MODES:
            points = [(links.index(link), 1e3 * seconds[mode]) for link, seconds in found.items() if mode in seconds]
            if points:
                (lines[mode],) = axes.plot(*zip(*points, strict=True), **style(mode), label=mode)
        axes.set_xticks(range(len(links)), links)
        axes.set_xlim(-0.2, len(links) - 0.8)
        axes.grid(axis="y", which="both", color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:g}")
    for line in grid:
        line[0].set_ylabel("ms a step")
    ordered = [lines[mode] for mode in MODES if mode in lines]
    figure.legend(handles=ordered, loc="outside right upper", frameon=False)
    return figure


def grouped(measured: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for part in measured:
        groups.setdefault((part["model"], part["hosts"]), []).append(part)
    return groups


def style(mode: str) -> dict[str, Any]:
    families = {name: family(name) for name in MODES}
    mine = families[mode]
    place = [name for name in MODES if families[name] == mine].index(mode)
    line = {"alone": ":", "ours": "-", "auto": "-"}.get(mine, "--")
    return {"color": COLOURS[mine], "marker": MARKERS[place], "linestyle": line, "linewidth": 1.2, "markersize": 5}


def family(mode: str) -> str:
    if mode == ALONE:
        return "alone"
    for start in ("Horovod", "DDP", "Auto"):
        if mode.startswith(start):
            return start.lower()
    return "ours"

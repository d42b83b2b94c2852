"""Pictures of a run: what was sent, and which layer was critical when.

Each function takes plain numbers and returns a `matplotlib.figure.Figure`. pyplot is never used, so they work
in any thread and without a display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hvd_accordion.policy.critical_regime import relaxation

# Okabe-Ito colours: distinct with any kind of colour blindness. In grey print critical is the darker one.
CRITICAL, RELAXED = "#D55E00", "#9CCDEB"
SENT, DENSE = "#0072B2", "#8C8C8C"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def sent_figure(epochs: Sequence[int], sent: Sequence[float], dense: Sequence[float]) -> Figure:
    """MB sent per epoch beside the MB that uncompressed gradients would have taken."""
    if not len(epochs) == len(sent) == len(dense):
        lengths = f"{len(epochs)}, {len(sent)} and {len(dense)}"
        raise ValueError(f"epochs, sent and dense must be equally long, got {lengths} values")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(epochs) <= 40 else None
    axes.plot(epochs, dense, color=DENSE, linestyle="--", marker=marker, markersize=4, label="uncompressed")
    axes.plot(epochs, sent, color=SENT, linewidth=2, marker=marker, markersize=5, label="sent")
    low, high = min([v for v in sent if v > 0], default=0.0), max(dense, default=0.0)
    if low and high / low > 20:  # on a linear axis the sent curve would lie on the zero line
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis, high / low)
    else:
        axes.set_ylim(0, None)
    if sum(sent) > 0:
        share = f"{_number(sum(sent))} of {_number(sum(dense))} MB, {sum(dense) / sum(sent):.3g} times less"
        axes.set_title(f"Gradient traffic per rank: {share}", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel="MB per epoch")
    _clean(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def regimes_figure(windows: Sequence[Mapping[str, str]], labels: Sequence[str] | None = None) -> Figure:
    """Heat map of regimes: a row for each layer, a column for each detection window.

    Args:
        windows: for each window, the regime ("critical", "relaxed" or "level i/n") by layer name. Rows keep this order; a
            layer missing from a window stays white.
        labels: names of the windows, by default 0, 1, 2...
    """
    layers, grid = _grid(windows)
    if labels is not None and len(labels) != len(windows):
        raise ValueError(f"labels must name each of the {len(windows)} windows, got {len(labels)} labels")
    height = 1.4 + 0.2 * min(max(len(layers), 4), 80)
    figure = Figure(figsize=(min(5 + 0.16 * len(windows), 14), height), layout="constrained")
    axes = figure.add_subplot()
    _draw_regimes(axes, layers, grid, labels, rows=80, columns=24)
    axes.set_xlabel("detection window")
    figure.legend(handles=_regime_patches(windows), loc="outside upper center", ncols=4, frameon=False)
    return figure


def short_name(name: str, limit: int = 32) -> str:
    """Cut a long layer name to `limit`: words become initials from the left, numbers tell layers apart."""
    parts = re.split(r"([./])", name)
    for index, part in enumerate(parts):
        if len(name) <= limit:
            return name
        if not any(c.isdigit() for c in part):
            parts[index] = part[:1]
        name = "".join(parts)
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _grid(windows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[float]]]:
    """Layer names in order of appearance, and for each layer 1 (critical) to 0 (relaxed), or NaN, by window."""
    layers = list(dict.fromkeys(name for window in windows for name in window))
    if not layers:
        raise ValueError("windows must hold at least one layer, got none")
    for window in windows:
        for name, regime in window.items():
            try:
                relaxation(regime)
            except ValueError:
                allowed = "'critical', 'relaxed' or 'level i/n'"
                raise ValueError(f"regime of {name!r} must be {allowed}, got {regime!r}") from None
    return layers, [[float(1 - relaxation(w[name])) if name in w else math.nan for w in windows] for name in layers]


def _draw_regimes(
    axes: Axes,
    layers: Sequence[str],
    grid: list[list[float]],
    labels: Sequence[str] | None,
    rows: int,
    columns: int,
) -> None:
    """Draw the heat map with at most `rows` and `columns` tick labels, so that they never touch."""
    n_rows, n_columns = len(grid), len(grid[0])
    colours = LinearSegmentedColormap.from_list("regimes", [RELAXED, CRITICAL])
    axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if n_columns <= 120 and n_rows <= 120:  # white lines between cells, as long as cells are wider than lines
        axes.xaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(n_columns - 1)]))
        axes.yaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(n_rows - 1)]))
        axes.grid(which="minor", color="white", linewidth=0.8)
    names = [str(label) for label in labels] if labels else [str(i) for i in range(n_columns)]
    columns = max(1, columns * 3 // max(3, *map(len, names)))  # a long label takes the room of several
    shown = range(0, n_columns, _step(n_columns, columns))
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=8)
    shown = range(0, n_rows, _step(n_rows, rows))
    axes.set_yticks(shown, [short_name(layers[i]) for i in shown], fontsize=8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _plain_log_ticks(axis: Axis, ratio: float) -> None:
    """Numbers such as 20, 50, 100 instead of powers of ten; fewer of them when the axis spans more."""
    choices = ((4, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)), (200, (1.0, 2.0, 5.0)), (1e4, (1.0, 3.0)))
    subs = next((subs for limit, subs in choices if ratio < limit), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.set_minor_locator(NullLocator())


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _step(count: int, room: int) -> int:
    """Smallest step of 1, 2, 5, 10, 20... with which at most `room` of `count` labels are shown."""
    steps: Iterator[int] = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return next(step for step in steps if math.ceil(count / step) <= room)


def _regime_patches(windows: Iterable[Mapping[str, str]]) -> list[Patch]:
    """For the legend: critical, levels between that occur, relaxed."""
    words = {"critical", "relaxed", *(regime for window in windows for regime in window.values())}
    colours = LinearSegmentedColormap.from_list("regimes", [RELAXED, CRITICAL])
    return [Patch(color=colours(float(1 - relaxation(word))), label=word) for word in sorted(words, key=relaxation)]


def _clean(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

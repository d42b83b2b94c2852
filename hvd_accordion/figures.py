"""Pictures of a run: what was sent, which layer was critical when, accuracy over traffic.

Each function takes plain numbers and returns a `matplotlib.figure.Figure`. pyplot is never used, so they work in
any thread and without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe-Ito colours: told apart with any kind of colour blindness. Critical is also the darker one in grey print.
CRITICAL, RELAXED = "#D55E00", "#9CCDEB"
SENT, DENSE = "#0072B2", "#8C8C8C"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REGIMES = {"relaxed": 0.0, "critical": 1.0}


def sent_figure(epochs: Sequence[int], sent: Sequence[float], dense: Sequence[float]) -> Figure:
    """MB sent per epoch beside the MB that uncompressed gradients would have taken."""
    if not len(epochs) == len(sent) == len(dense):
        raise ValueError(f"epochs, sent and dense must be equally long, got {len(epochs)}, {len(sent)}, {len(dense)}")
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
        total = f"{sum(sent):,.4g} of {sum(dense):,.4g} MB, {sum(dense) / sum(sent):.3g} times less"
        axes.set_title(f"Gradient traffic per rank: {total}", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="MB per epoch")
    _clean(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def regimes_figure(windows: Sequence[Mapping[str, str]], labels: Sequence[str] | None = None) -> Figure:
    """Heat map of regimes: a row for each layer, a column for each detection window.

    Args:
        windows: for each window, the regime ("critical" or "relaxed") by layer name; the rows keep this order, and a
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
    figure.legend(handles=_regime_patches(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def accuracy_figure(
    runs: Mapping[str, Sequence[tuple[float, float]]], xlabel: str = "MB sent per rank", ylabel: str = "test accuracy"
) -> Figure:
    """One line for each run through its points (MB sent, accuracy), over a logarithmic axis."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    _draw_accuracy(axes, runs, xlabel, ylabel)
    figure.legend(loc="outside lower center", ncols=min(3, max(1, len(runs))), frameon=False)
    return figure


def demo_figure(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    windows_by_run: Mapping[str, Sequence[Mapping[str, str]]],
    xlabel: str = "MB sent per rank",
    ylabel: str = "test accuracy",
) -> Figure:
    """Left: accuracy over traffic for all runs. Right: the regimes of each adaptive run, one under the other."""
    panels = {name: windows for name, windows in windows_by_run.items() if windows}
    if not panels:
        return accuracy_figure(runs, xlabel, ylabel)
    tallest = max(len(_grid(windows)[0]) for windows in panels.values())
    panel_height = min(1.2 + 0.2 * max(tallest, 6), 6.0)
    figure = Figure(figsize=(14, max(5.4, 0.6 + panel_height * len(panels))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05), wspace=0.03)
    # a very tall column of heat maps must not stretch the curves: they keep the upper part
    parts = left.subfigures(2, 1, height_ratios=(1, 0.5)) if figure.get_figheight() > 9 else [left]
    axes = parts[0].add_subplot()
    _draw_accuracy(axes, runs, xlabel, ylabel)
    parts[0].legend(loc="outside lower center", ncols=2, frameon=False)
    for index, (name, windows) in enumerate(panels.items(), start=1):
        axes = right.add_subplot(len(panels), 1, index)
        layers, grid = _grid(windows)
        _draw_regimes(axes, layers, grid, None, rows=max(4, int(5.5 * (panel_height - 0.8))), columns=20)
        axes.set_title(name, fontsize=10)
    axes.set_xlabel("detection window")
    right.legend(handles=_regime_patches(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _grid(windows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[float]]]:
    """Layer names in order of appearance, and for each layer 1 (critical), 0 (relaxed) or NaN by window."""
    layers = list(dict.fromkeys(name for window in windows for name in window))
    if not layers:
        raise ValueError("windows must hold at least one layer, got none")
    for window in windows:
        for name, regime in window.items():
            if regime not in REGIMES:
                raise ValueError(f"regime of {name!r} must be one of {sorted(REGIMES)}, got {regime!r}")
    return layers, [[REGIMES[w[name]] if name in w else math.nan for w in windows] for name in layers]


def _draw_regimes(
    axes: Axes, layers: Sequence[str], grid: list[list[float]], labels: Sequence[str] | None, rows: int, columns: int
) -> None:
    """Draw the heat map with at most `rows` and `columns` tick labels, so that they never touch."""
    n_rows, n_columns = len(grid), len(grid[0])
    axes.imshow(grid, cmap=ListedColormap([RELAXED, CRITICAL]), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if n_columns <= 120 and n_rows <= 120:  # white lines between cells, as long as cells are wider than lines
        axes.xaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(n_columns - 1)]))
        axes.yaxis.set_minor_locator(FixedLocator([i + 0.5 for i in range(n_rows - 1)]))
        axes.grid(which="minor", color="white", linewidth=0.8)
    # labels such as "epoch 10" take the room of several digits
    widest = max((len(str(label)) for label in labels), default=1) if labels else 3
    step_x, step_y = math.ceil(n_columns * max(widest, 3) / 3 / columns), math.ceil(n_rows / rows)
    ticks = range(0, n_columns, step_x)
    axes.set_xticks(ticks, [str(labels[i] if labels else i) for i in ticks], fontsize=8)
    axes.set_yticks(range(0, n_rows, step_y), [_short(layers[i]) for i in range(0, n_rows, step_y)], fontsize=8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _draw_accuracy(axes: Axes, runs: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> None:
    """Draw one line for each run; points at 0 MB have no place on a logarithmic axis and are left out."""
    seen: list[float] = []
    for index, (name, points) in enumerate(runs.items()):
        kept = [(x, y) for x, y in points if x > 0]
        seen += [x for x, _ in kept]
        style = "-" if index < len(LINES) else "--"
        axes.plot(
            [x for x, _ in kept],
            [y for _, y in kept],
            color=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=style,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=name,
        )
    axes.set_xscale("log")
    if seen:
        _plain_log_ticks(axes.xaxis, max(seen) / min(seen))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _clean(axes)


def _plain_log_ticks(axis: object, ratio: float) -> None:
    """Numbers such as 20, 50, 100 instead of powers of ten; fewer of them when the axis spans more."""
    subs = (1.0, 2.0, 5.0) if ratio < 2e3 else (1.0,)
    if ratio < 4:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if 1e-3 <= value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _regime_patches() -> list[Patch]:
    return [Patch(color=CRITICAL, label="critical"), Patch(color=RELAXED, label="relaxed")]


def _clean(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str, limit: int = 32) -> str:
    """Cut a long layer name in the middle: both its module and its last part tell layers apart."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"

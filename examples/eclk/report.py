"""Reports of the runs: a table, two figures like the papers', JSON, MLflow."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eclk.runs import Outcome
from hvd_accordion.tracking.figures import LINES

PICTURES = {"rounds.png": ("rounds", 0), "bits.png": ("kilobits sent per node", 1)}  # and the index in Outcome.points
COUNTED = (
    "Kilobits per node as the papers count: TopK K (32 + ceil(log2 d)), RandomK 32 K, dense 32 d bits a message; "
    "ECLK and EC-LSVRG with shift refresh send one dense message more whenever w has moved."
)


def write(outcomes: Sequence[Outcome], out: Path) -> str:
    """Writes table.md, results.json and both figures to `out`. Returns the table."""
    text = table(outcomes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(f"{text}\n\n{COUNTED}\n", encoding="utf-8")
    write_json(outcomes, out / "results.json")
    for name, (xlabel, place) in PICTURES.items():
        picture(outcomes, xlabel, place).savefig(out / name, dpi=130)
    return text


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    path.write_text(json.dumps([found.row() for found in outcomes], indent=1) + "\n", encoding="utf-8")


def table(outcomes: Sequence[Outcome]) -> str:
    """Formats the Markdown table. A row that missed the tolerance shows its rounds and kilobits so far."""
    rows = [["data", "method", "compressor", "shift", "settings", "rounds", "kbit per node", "seconds", "P - P*"]]
    for r in outcomes:
        settings = ", ".join(f"{key}={value:g}" for key, value in r.settings.items()) or "default"
        more = "" if r.reached else "> "
        numbers = [f"{more}{r.rounds:,}", f"{more}{r.kilobits:,.0f}", f"{r.seconds:.1f}", f"{r.suboptimality:.1e}"]
        rows.append([r.data, r.method, compressor(r.compressor), r.shift, settings, *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [i >= 5 for i in range(len(widths))]
    lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in rows]
    lines.insert(1, ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compressor(text: str) -> str:
    """Returns a short name: TopK 3.3 % for TopK(ratio=0.0333..., algorithm='allgather')."""
    found = re.match(r"(\w+)\((?:ratio=([\d.e-]+))?", text)
    if not found:
        return text
    return (
        f"{found[1]} {float(found[2]):.2g}".replace(" 0.033", " 1/30") if found[2] else found[1].replace("Dense", "-")
    )


def picture(outcomes: Sequence[Outcome], xlabel: str, place: int) -> Figure:
    """Plots suboptimality over rounds or bits: a panel per problem, a line per row, dashed if untuned."""
    data = list(dict.fromkeys(found.data for found in outcomes))
    kinds = list(dict.fromkeys(found.label.removesuffix(", untuned") for found in outcomes))
    columns = min(2, len(data))
    lines = -(-len(data) // columns)
    figure = Figure(figsize=(6.2 * columns if columns > 1 else 7.5, 4.0 * lines + 0.8), layout="constrained")
    handles: dict[str, object] = {}
    for i, name in enumerate(data, 1):
        axes = figure.add_subplot(lines, columns, i)
        for found in outcomes:
            if found.data == name:
                handles.setdefault(found.label, draw(axes, found, kinds, place))
        axes.set(title=name, xscale="log", yscale="log", xlabel=xlabel)
        axes.set_ylabel("P(x) - P*" if (i - 1) % columns == 0 else "")
        axes.set_ylim(bottom=min(f.suboptimality for f in outcomes if f.data == name) / 3)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5 if columns > 1 else 3, frameon=False)
    return figure


def draw(axes: Axes, found: Outcome, kinds: Sequence[str], place: int) -> object:
    colour = LINES[kinds.index(found.label.removesuffix(", untuned")) % len(LINES)]
    points = [(p[place], p[2]) for p in found.points[2:] if p[2] > 0]  # the first rounds show nothing
    style = "--" if found.label.endswith(", untuned") else "-"
    (line,) = axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.8)
    if found.reached:
        axes.plot(*points[-1], "o", color=colour, markersize=4.5)
    return line


def log(outcomes: Sequence[Outcome], out: Path, uri: str, experiment: str) -> None:
    """Logs an MLflow run per row, with its curve over the rounds, and one with table and figures."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    place = known.experiment_id if known else client.create_experiment(experiment)
    summary = client.create_run(place, run_name="eclk").info.run_id
    for name in ("table.md", "results.json", *PICTURES):
        client.log_artifact(summary, str(out / name))
    client.set_terminated(summary)
    now = int(time.time() * 1000)
    for found in outcomes:
        tags = {"mlflow.parentRunId": summary}
        run = client.create_run(place, tags=tags, run_name=f"{found.data}: {found.label}").info.run_id
        names = ("data", "method", "compressor", "shift", "settings")
        client.log_batch(run, params=[Param(name, str(getattr(found, name))) for name in names])
        final = {"rounds": found.rounds, "seconds": found.seconds, "reached": float(found.reached)}
        metrics = [Metric(key, value, now, found.rounds) for key, value in final.items()]
        for round_, kilobits, suboptimality in thinned(found.points):
            metrics += [Metric("kilobits", kilobits, now, round_), Metric("suboptimality", suboptimality, now, round_)]
        client.log_batch(run, metrics=metrics)
        client.set_terminated(run)


def thinned(points: list[tuple[int, float, float]], most: int = 200) -> list[tuple[int, float, float]]:
    """Returns at most about `most` of the points, always with the last."""
    return points[: -1 : -(-len(points) // most)] + points[-1:]

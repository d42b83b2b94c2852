"""`report`: what MLflowLogger wrote of a run, as tables and pictures."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hvd_accordion.cli.findings import table
from hvd_accordion.training.reports import LayerRecord

MISSING = "report needs mlflow and matplotlib: pip install hvd_accordion[mlflow]"
TRAFFIC = ("sent_bytes", "dense_bytes")
OURS = (*TRAFFIC, "compression_ratio", "critical_layers", "critical_bytes", "exchange_seconds")
MAX_VALUE = 100  # characters of a parameter

Series = Mapping[int, float]  # a metric's last value at each step


class NoRunError(LookupError):
    """MLflow knows no such run, or cannot be asked."""


@dataclass(frozen=True)
class Run:
    """What MLflow holds of a run. `windows` has the layers by detection window; empty where nothing adapted."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, Series]
    windows: Mapping[int, Mapping[str, LayerRecord]]
    namesakes: int = 0  # other, earlier runs of this name


def main(wanted: str, tracking_uri: str | None, out: str) -> int:
    """Prints the run's tables and draws its pictures; 2 where there is no such run, 1 where nothing could be drawn."""
    try:
        run = load(wanted, tracking_uri)
    except NoRunError as error:
        print(f"hvd-accordion: {error}", file=sys.stderr)
        return 2
    print(text(run))
    try:
        for path in draw(run, Path(out)):
            print(f"Written: {path}")
    except (ImportError, OSError) as error:
        print(f"hvd-accordion: no pictures: {MISSING if isinstance(error, ImportError) else error}", file=sys.stderr)
        return 1
    return 0


# from MLflow


def load(wanted: str, tracking_uri: str | None = None) -> Run:
    """The run of this id, or else the latest of this name. NoRunError where there is none."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of seven, over minutes
    try:
        import mlflow
    except ImportError as error:
        raise NoRunError(MISSING) from error
    uri = tracking_uri or mlflow.get_tracking_uri()
    place = local(uri)
    if place is not None and not place.exists():  # MLflow would make it
        raise NoRunError(
            f"there is no MLflow data at {place}; --tracking-uri or MLFLOW_TRACKING_URI names another place"
        )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found, namesakes = find(client, wanted)
        if found is None:
            raise NoRunError(f"no run has the id or the name {wanted!r} in {uri}")
        keys = list(found.data.metrics)
        metrics = {key: _history(client, found.info.run_id, key) for key in keys if not key.startswith("system/")}
        windows = _windows(client, found.info.run_id)
    except NoRunError:
        raise
    except Exception as error:  # of a database, a server or the network: each store has its own
        raise NoRunError(f"MLflow at {uri} gives no answer: {type(error).__name__}: {error}") from error
    info = found.info
    return Run(info.run_id, info.run_name, info.status, dict(found.data.params), metrics, windows, namesakes)


def local(uri: str) -> Path | None:
    """The file or folder that a tracking URI means; None for a server."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return Path(unquote(parts.path)[1:])  # sqlite:///here.db, sqlite:////there/here.db
    if parts.scheme in ("", "file") and not uri.startswith("databricks"):
        return Path(unquote(parts.path))
    return None


def find(client: Any, wanted: str) -> tuple[Any, int]:
    """The run of this id, or the latest of this name, and how many others have the name; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(wanted), 0
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    quote = '"' if "'" in wanted else "'"
    experiments = [each.experiment_id for each in _pages(client.search_experiments)]
    runs = _pages(
        client.search_runs,
        experiment_ids=experiments,
        filter_string=f"attributes.run_name = {quote}{wanted}{quote}",
        order_by=["attributes.start_time DESC"],
    )
    return (runs[0], len(runs) - 1) if runs else (None, 0)


def _pages(search: Any, **query: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(**query, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _history(client: Any, run_id: str, key: str) -> dict[int, float]:
    return {value.step: value.value for value in client.get_metric_history(run_id, key)}


def _windows(client: Any, run_id: str) -> dict[int, dict[str, LayerRecord]]:
    if not any(file.path == "regimes.json" for file in client.list_artifacts(run_id)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        rows = json.loads(Path(client.download_artifacts(run_id, "regimes.json", folder)).read_text(encoding="utf-8"))
    return {row["window"]: {name: _record(its) for name, its in row["layers"].items()} for row in rows}


def _record(its: Mapping[str, Any]) -> LayerRecord:
    """NaN and Inf are strings there (records.windows_json)."""
    ratio = None if its["ratio"] is None else float(its["ratio"])
    return LayerRecord(float(its["norm"]), ratio, its["regime"], its["spec"], int(its["bytes_per_step"]))


# as text


def text(run: Run) -> str:
    parts = [f"Run {run.name!r} ({run.run_id}), {run.status}"]
    if run.namesakes:
        parts[0] += f"; the latest of {run.namesakes + 1} of this name"
    if run.params:
        parts.append(table([(key, _short(value)) for key, value in sorted(run.params.items())], left=(0, 1)))
    parts.append(epochs(run.metrics))
    if run.windows:
        parts.append(layers(run.windows))
    elif any(key.startswith("layer/") for key in run.metrics):
        parts.append("No table of layers: MLflowLogger writes regimes.json when the run ends, and this one has none.")
    return "\n\n".join(parts) + "\n"


def epochs(metrics: Mapping[str, Series]) -> str:
    """A row for each epoch: traffic, regimes, and whatever else was logged at these steps and no others."""
    sent, dense = (metrics.get(key, {}) for key in TRAFFIC)
    steps = sorted(set(sent) & set(dense))
    if not steps:
        return "No epoch was logged: no traffic to report."
    own = [k for k, its in metrics.items() if k not in OURS and not k.startswith("layer/") and set(its) <= set(steps)]
    rows = [["epoch", "MB sent", "MB dense", "times less", "critical layers", "s in exchange", *own]]
    for step in steps:
        shown = [_number(metrics[key].get(step)) for key in own]
        critical, taken = (metrics.get(key, {}).get(step) for key in ("critical_layers", "exchange_seconds"))
        share = "-" if critical is None else f"{critical:.0%}"
        seconds = _number(taken or None)  # 0: TensorFlow's graph can't tell
        rows.append([str(step), *_traffic(sent[step], dense[step]), share, seconds, *shown])
    whole = sum(sent[step] for step in steps), sum(dense[step] for step in steps)
    rows.append(["all", *_traffic(*whole), *[""] * (len(rows[0]) - 4)])
    return table(rows, left=())


def layers(windows: Mapping[int, Mapping[str, LayerRecord]]) -> str:
    """A row for each adaptive layer: in how many windows it was critical, how often it changed, how it travels at last."""
    rows = [("layer", "compression", "regime", "windows", "critical", "changes", "norm", "bytes a step")]
    for name in dict.fromkeys(name for window in sorted(windows) for name in windows[window]):
        records = [windows[window][name] for window in sorted(windows) if name in windows[window]]
        regimes, last = [record.regime for record in records], records[-1]
        changes = sum(a != b for a, b in itertools.pairwise(regimes))
        critical = f"{regimes.count('critical') / len(regimes):.0%}"
        counts = (str(len(records)), critical, str(changes), f"{last.norm:.3g}", f"{last.bytes_per_step:,}")
        rows.append((name, last.spec, last.regime, *counts))
    return table(rows, left=(0, 1, 2))


def _traffic(sent: float, dense: float) -> tuple[str, str, str]:
    return f"{sent / 1e6:,.2f}", f"{dense / 1e6:,.2f}", f"{dense / sent if sent else 1.0:,.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= MAX_VALUE else line[: MAX_VALUE - 1] + "…"


# as pictures


def draw(run: Run, out: Path) -> Sequence[Path]:
    """Writes compression.png and regimes.png, as far as there is something to show, and returns their paths.

    ImportError without matplotlib, OSError where the folder can't be written to.
    """
    from hvd_accordion.tracking import figures

    drawn = {}
    sent, dense = (run.metrics.get(key, {}) for key in TRAFFIC)
    if steps := sorted(set(sent) & set(dense)):
        both = ([series[step] / 1e6 for step in steps] for series in (sent, dense))
        drawn["compression.png"] = figures.sent_figure(steps, *both)
    if any(run.windows.values()):
        order = sorted(run.windows)
        regimes = [{name: record.regime for name, record in run.windows[window].items()} for window in order]
        drawn["regimes.png"] = figures.regimes_figure(regimes, [str(window) for window in order])
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / name, dpi=120)
    return [out / name for name in drawn]

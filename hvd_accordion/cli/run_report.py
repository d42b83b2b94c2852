"""`report`: shows a run that MLflowLogger wrote, as tables and figures."""

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
from hvd_accordion.tracking.metrics import regimes_of
from hvd_accordion.training.reports import LayerRecord

MISSING = "report needs mlflow and matplotlib: pip install hvd_accordion[mlflow]"
TRAFFIC = ("sent_bytes", "dense_bytes")
OURS = (*TRAFFIC, "compression_ratio", "critical_layers", "critical_bytes", "exchange_seconds")
MAX_VALUE = 100  # characters of a parameter

Series = Mapping[int, float]  # the last value of a metric at each step


class NoRunError(LookupError):
    """MLflow has no such run, or does not answer."""


@dataclass(frozen=True)
class Run:
    """A run's records in MLflow.

    `windows` has the layers by detection window. It is empty if no layer has an adaptive policy.
    """

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, Series]
    windows: Mapping[int, Mapping[str, LayerRecord]]
    namesakes: int = 0  # number of earlier runs of this name


def main(wanted: str, tracking_uri: str | None, out: str) -> int:
    """Prints the run's tables and saves its figures. Returns 2 if there is no such run, 1 if figures cannot be saved."""
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
        print(f"hvd-accordion: no figures: {MISSING if isinstance(error, ImportError) else error}", file=sys.stderr)
        return 1
    return 0


# reading from MLflow


def load(wanted: str, tracking_uri: str | None = None) -> Run:
    """Reads the run of this id, or the latest of this name.

    Raises:
        NoRunError: there is none, or MLflow is missing or does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default of 7 takes minutes
    try:
        import mlflow
    except ImportError as error:
        raise NoRunError(MISSING) from error
    uri = tracking_uri or mlflow.get_tracking_uri()
    place = local(uri)
    if place is not None and not place.exists():  # MLflow would create it
        raise NoRunError(
            f"there is no MLflow data at {place}; set another location by --tracking-uri or MLFLOW_TRACKING_URI"
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
    except Exception as error:  # databases, servers and the network raise their own classes
        raise NoRunError(f"MLflow at {uri} does not answer: {type(error).__name__}: {error}") from error
    info = found.info
    return Run(info.run_id, info.run_name, info.status, dict(found.data.params), metrics, windows, namesakes)


def local(uri: str) -> Path | None:
    """Returns the file or folder of a tracking URI, None for a server."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return Path(unquote(parts.path)[1:])  # sqlite:///here.db, sqlite:////there/here.db
    if parts.scheme in ("", "file") and not uri.startswith("databricks"):
        return Path(unquote(parts.path))
    return None


def find(client: Any, wanted: str) -> tuple[Any, int]:
    """Returns the run of this id, or the latest of this name or None, and the number of other runs of this name."""
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
    return {row["window"]: {name: _record(record) for name, record in row["layers"].items()} for row in rows}


def _record(record: Mapping[str, Any]) -> LayerRecord:
    """Parses a layer's record, in which NaN and Inf are strings (see records.windows_json)."""
    ratio = None if record["ratio"] is None else float(record["ratio"])
    return LayerRecord(float(record["norm"]), ratio, record["regime"], record["spec"], int(record["bytes_per_step"]))


# tables


def text(run: Run) -> str:
    """Formats the run as tables."""
    parts = [f"Run {run.name!r} ({run.run_id}), {run.status}"]
    if run.namesakes:
        parts[0] += f"; the latest of {run.namesakes + 1} of this name"
    if run.params:
        parts.append(table([(key, _short(value)) for key, value in sorted(run.params.items())], left=(0, 1)))
    parts.append(epochs(run.metrics))
    if run.windows:
        parts.append(layers(run.windows))
    elif any(key.startswith("layer/") for key in run.metrics):
        parts.append("No table of layers: MLflowLogger writes regimes.json at the end of a run, and this run has none.")
    return "\n\n".join(parts) + "\n"


def epochs(metrics: Mapping[str, Series]) -> str:
    """Formats a row per epoch: traffic, regimes, and each other metric that was logged at these steps only."""
    sent, dense = (metrics.get(key, {}) for key in TRAFFIC)
    steps = sorted(set(sent) & set(dense))
    if not steps:
        return "No epoch was logged: there is no traffic to report."
    logged = [key for key in metrics if key not in OURS and not key.startswith("layer/")]
    own = [key for key in logged if set(metrics[key]) <= set(steps)]
    rows = [["epoch", "MB sent", "MB dense", "ratio", "critical layers", "s in exchange", *own]]
    for step in steps:
        values = [_number(metrics[key].get(step)) for key in own]
        critical, exchange = (metrics.get(key, {}).get(step) for key in ("critical_layers", "exchange_seconds"))
        share = "-" if critical is None else f"{critical:.0%}"
        seconds = _number(exchange or None)  # 0: not measured, as in a TensorFlow graph
        rows.append([str(step), *_traffic(sent[step], dense[step]), share, seconds, *values])
    totals = sum(sent[step] for step in steps), sum(dense[step] for step in steps)
    rows.append(["all", *_traffic(*totals), *[""] * (len(rows[0]) - 4)])
    return table(rows, left=())


def layers(windows: Mapping[int, Mapping[str, LayerRecord]]) -> str:
    """Formats a row per adaptive layer: windows, share of critical ones, changes of regime, and the latest compression."""
    rows = [("layer", "compression", "regime", "windows", "critical", "changes", "norm", "bytes per step")]
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


# figures


def draw(run: Run, out: Path) -> Sequence[Path]:
    """Saves compression.png and regimes.png, if the run has data for them, and returns their paths.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    from hvd_accordion.tracking import figures

    drawn = {}
    sent, dense = (run.metrics.get(key, {}) for key in TRAFFIC)
    if steps := sorted(set(sent) & set(dense)):
        both = ([series[step] / 1e6 for step in steps] for series in (sent, dense))
        drawn["compression.png"] = figures.sent_figure(steps, *both)
    regimes = regimes_of(run.windows)
    if any(regimes.values()):
        drawn["regimes.png"] = figures.regimes_figure(list(regimes.values()), list(map(str, regimes)))
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / name, dpi=120)
    return [out / name for name in drawn]

"""Names and values of the MLflow metrics, JSON and pictures. Pure functions, but for `save_artifacts`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from hvd_accordion.policy.critical_regime import relaxation
from hvd_accordion.training.reports import NO_REGIME, LayerRecord

MAX_KEY_LENGTH = 250  # of a metric's name, MLflow's limit


class MetricValue(NamedTuple):
    """One metric value, in the order of mlflow.entities.Metric."""

    key: str
    value: float
    timestamp: int
    step: int


def metric_key(name: str, limit: int = MAX_KEY_LENGTH) -> str:
    """`name` in the characters and length that MLflow accepts; other characters become underscores."""
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    # MLflow refuses keys that change as a path: no empty, "." or ".." parts
    key = "/".join("__" if part == ".." else part for part in parts if part not in ("", ".")) or "_"
    if len(key) <= limit:
        return key
    half = (limit - 1) // 2  # long names differ at either end
    return metric_key(f"{key[:half]}_{key[-half:]}", limit)


def metric_values(metrics: Mapping[str, Any], step: int, timestamp: int) -> tuple[list[MetricValue], list[str]]:
    """Values to log, and a message for each value that is not a number.

    Infinity becomes NaN: MLflow's database would store 1.8e308, which flattens every chart.
    """
    values, bad = [], []
    for name, raw in metrics.items():
        try:
            value, at = float(raw), int(step)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several elements
            got = f"{raw!r:.80} at step {step!r:.80}"
            bad.append(f"metric {name!r} must be a number at an integer step, got {got}")
            continue
        value = value if math.isfinite(value) else math.nan
        values.append(MetricValue(metric_key(str(name)), value, timestamp, at))
    return values, bad


def layer_metrics(layers: Mapping[str, LayerRecord]) -> dict[str, float]:
    """`layer/<name>/norm`, `/ratio` and `/critical` for each layer.

    The last is 1 for a critical layer, 0 for a relaxed one, and 1 - i/n for "level i/n".
    """
    metrics = {}
    for name, record in layers.items():
        prefix = "layer/" + metric_key(name, MAX_KEY_LENGTH - len("layer//critical"))
        metrics[f"{prefix}/norm"] = record.norm
        if record.ratio is not None:
            metrics[f"{prefix}/ratio"] = record.ratio
        if record.regime != NO_REGIME:
            metrics[f"{prefix}/critical"] = float(1 - relaxation(record.regime))
    return metrics


def regimes_of(windows: Mapping[int, Mapping[str, LayerRecord]]) -> dict[int, dict[str, str]]:
    """By window and layer, in the order of the windows; without layers whose policy has no word for a regime."""
    return {
        window: {name: str(x.regime) for name, x in windows[window].items() if x.regime != NO_REGIME}
        for window in sorted(windows)
    }


def windows_json(windows: Mapping[int, Mapping[str, LayerRecord]]) -> str:
    """All windows as strict JSON: NaN and Inf as the strings "nan" and "inf"."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    rows = []
    for window, layers in sorted(windows.items()):
        plain_layers = {n: {k: plain(v) for k, v in asdict(record).items()} for n, record in layers.items()}
        rows.append({"window": window, "layers": plain_layers})
    return json.dumps(rows, indent=1, default=float)


def save_artifacts(
    folder: str, epochs: Mapping[int, tuple[float, float]], windows: Mapping[int, Mapping[str, LayerRecord]]
) -> Iterator[str]:
    """Writes each artifact that has data, and yields its path."""
    if windows:
        path = os.path.join(folder, "regimes.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(windows_json(windows))
        yield path
    if not epochs and not any(windows.values()):
        return
    from hvd_accordion.tracking import figures

    if epochs:
        steps = sorted(epochs)
        sent, dense = ([epochs[step][i] / 1e6 for step in steps] for i in (0, 1))
        path = os.path.join(folder, "compression.png")
        figures.sent_figure(steps, sent, dense).savefig(path, dpi=120)
        yield path
    regimes = regimes_of(windows)
    if any(regimes.values()):
        path = os.path.join(folder, "regimes.png")
        figures.regimes_figure(list(regimes.values()), list(map(str, regimes))).savefig(path, dpi=120)
        yield path

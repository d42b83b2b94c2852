"""MLflow records of a run: parameters, traffic per epoch, regime of each layer, pictures.

Training only puts records on a queue; the thread of `background` talks to MLflow. Neither mlflow nor matplotlib is
imported before it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from hvd_accordion.tracking.background import Counts, Destination, Sender
from hvd_accordion.tracking.metrics import layer_metrics, metric_key, metric_values
from hvd_accordion.training.reports import LayerRecord
from hvd_accordion.utils import validation

QUEUE_LIMIT = 10_000  # log calls waiting for the server; more are dropped
MAX_PARAM_LENGTH = 6000  # limit of MLflow
STATUSES = ("FINISHED", "FAILED", "KILLED")
MISSING = "MLflowLogger needs mlflow: pip install hvd_accordion[mlflow]"


class MLflowLogger:
    """Logs a training run to MLflow from a background thread. The optimizer calls it on rank 0.

    An MLflow run that is active when the optimizer starts is joined and left open. Otherwise a run is created
    and ended by `finish`, by the end of a `with` block or when Python exits: FINISHED, or FAILED after an
    uncaught exception. If the process is killed, a small separate process marks the run FAILED.

    Direct uploads to S3 and the like need thread pools, which an exiting Python no longer runs: with such an artifact
    store call `finish` or use `with`.

    Args:
        tracking_uri: MLflow server or database; None: MLflow's own setting.
        experiment_name: experiment of a created run, created if missing; None: MLflow's own setting.
        run_name: name of a created run.
        tags: tags of the run.
        per_layer: log norm, ratio and regime of each layer as metrics. The artifacts always show them.
        flush_timeout: seconds that `finish` waits at most, > 0.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        per_layer: bool = True,
        flush_timeout: float = 30.0,
    ) -> None:
        self._to = Destination(
            uri=_text("tracking_uri", tracking_uri),
            experiment=_text("experiment_name", experiment_name),
            run_name=_text("run_name", run_name),
            tags=_text_mapping("tags", tags),
        )
        self._per_layer = validation.boolean("per_layer", per_layer)
        self._timeout = validation.real("flush_timeout", flush_timeout, 0.0, threading.TIMEOUT_MAX)
        try:  # here and not in the worker, where it would race with the imports of the user's script
            import mlflow  # noqa: F401
        except ImportError as error:
            raise ImportError(MISSING) from error

        self._starts = 0
        self._finished = False  # nothing more is accepted
        self._epochs: dict[int, tuple[float, float]] = {}  # bytes sent and dense
        self._windows: dict[int, dict[str, LayerRecord]] = {}
        self._counts = Counts()
        self._sender = Sender(self._to, self._counts, self._epochs, self._windows)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until it is joined or created."""
        return self._to.run_id

    @property
    def delivered(self) -> int:
        """Number of values (metrics and parameters) that MLflow has taken so far."""
        return self._counts.delivered

    @property
    def dropped(self) -> int:
        """Number of values (metrics and parameters) that did not reach MLflow."""
        counts = self._counts
        return counts.offered - counts.delivered if self._sender.abandoned else counts.lost

    def start(self, params: Mapping[str, object]) -> None:
        """Joins the run that is active in this thread, or has one created, and logs `params`.

        A second optimizer may start the same logger: its parameters get the prefix `optimizer2.`.
        """
        self._starts += 1
        self._counts.warns = True
        if self._starts == 1 and not self._finished:
            self._find_run()
            atexit.register(self._at_exit)
            self._sender.start()
        prefix = "" if self._starts == 1 else f"optimizer{self._starts}."
        texts = {metric_key(f"{prefix}{k}"): str(v)[:MAX_PARAM_LENGTH] for k, v in params.items()}
        self._put("params", texts)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of one epoch at step `epoch`."""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # such an epoch is not drawn
            self._epochs[epoch] = (float(metrics["sent_bytes"]), float(metrics["dense_bytes"]))
        self.log_metrics(metrics, epoch)

    def log_window(self, window: int, layers: Mapping[str, LayerRecord]) -> None:
        """Logs norm, ratio and regime of each layer in one detection window, at step `window`."""
        self._windows.setdefault(window, {}).update(layers)
        if self._per_layer:
            self.log_metrics(layer_metrics(layers), window)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs your own metrics, such as an accuracy. Never waits. Drops values that are not numbers."""
        values, complaints = metric_values(metrics, 0 if step is None else step, int(time.time() * 1000))
        for complaint in complaints:
            self._counts.offer(1)
            self._counts.lose(1, complaint)
        if values:
            self._put("metrics", values)

    def finish(self, status: str | None = None) -> None:
        """Sends the queued records, uploads the pictures and ends a run that was created here. Later calls do nothing.

        Args:
            status: FINISHED (default), FAILED or KILLED.
        """
        if status is not None:
            validation.choice("status", status, STATUSES)
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._at_exit)
        if not self._starts:  # as on all ranks but 0
            return
        if not self._sender.finish(status or "FINISHED", self._timeout):
            self._counts.lose(0, f"no answer within {self._timeout:g} s, {self.dropped} values not sent")
        self._sender.dismiss_watchdog()

    def __enter__(self) -> MLflowLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if kind is None else "FAILED")

    def _at_exit(self) -> None:
        # Python sets one of these when it goes down on an uncaught exception
        failed = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        self.finish("FAILED" if failed else "FINISHED")

    def _find_run(self) -> None:
        """Finds the active run of this thread and MLflow's present settings."""
        import mlflow

        to = self._to
        active, default = mlflow.active_run(), mlflow.get_tracking_uri()
        elsewhere = to.uri is not None and to.uri != default
        to.uri = to.uri or default
        if active is not None and not elsewhere:
            to.run_id = active.info.run_id
            return
        to.owned = True
        # mlflow.set_experiment() leaves the id in the environment, so it goes before the name; on another
        # server than the one that MLflow is set to, it means nothing
        if to.experiment is None and not (elsewhere and mlflow.is_tracking_uri_set()):
            to.experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        if to.experiment is None and to.experiment_id == "0":
            to.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or None

    def _put(self, kind: str, values: Any) -> None:
        self._counts.offer(len(values))
        if self._finished:
            self._counts.lose(len(values), "logged after finish()")
        elif self._sender.queue.qsize() < QUEUE_LIMIT:
            self._sender.queue.put((kind, values))
        else:
            self._counts.lose(len(values), "MLflow is too slow, the queue is full")


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None, got {value!r}")
    if value == "":
        raise ValueError(f"{name} must be a non-empty string or None, got {value!r}")
    return value


def _text_mapping(name: str, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(t, str) for pair in value.items() for t in pair):
        raise TypeError(f"{name} must be a mapping of strings to strings or None, got {value!r}")
    return dict(value)

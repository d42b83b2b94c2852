"""MLflow records of a run: parameters, traffic per epoch, regime of each layer, pictures.

Training only puts records on a queue; one daemon thread talks to MLflow. A slow or dead server costs records,
never training time. Neither mlflow nor matplotlib is imported before it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_accordion.tracking.metrics import MetricValue, layer_metrics, metric_key, metric_values, save_artifacts
from hvd_accordion.tracking.watchdog import RunWatchdog
from hvd_accordion.training.reports import LayerRecord
from hvd_accordion.utils import validation

log = logging.getLogger("hvd_accordion")

QUEUE_LIMIT = 10_000  # log calls waiting for the server; more are dropped
MAX_METRICS, MAX_PARAMS = 1000, 100  # per request, limits of MLflow
MAX_PARAM_LENGTH = 6000
STATUSES = ("FINISHED", "FAILED", "KILLED")
MISSING = "MLflowLogger needs mlflow: pip install hvd_accordion[mlflow]"


class MLflowLogger:
    """Logs a training run to MLflow from a thread of its own. Used by the optimizer on rank 0.

    An MLflow run that is active when the optimizer starts is joined and left open. Otherwise a run is created
    and ended by `finish`, by the end of a `with` block or when Python exits: FINISHED, or FAILED after an
    uncaught exception. Where the process is killed, a small process of its own marks the run FAILED.

    An exiting Python runs no thread pools any more, and direct uploads to S3 and the like need them: with an
    artifact store like that call `finish` or use `with`.

    Args:
        tracking_uri: MLflow server or database, by default MLflow's own setting.
        experiment_name: experiment of a created run, made if missing; by default MLflow's own setting.
        run_name: name of a created run.
        tags: tags of the run.
        per_layer: log norm, ratio and regime of each layer as metrics. The artifacts show them in any case.
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
        self._uri = _text("tracking_uri", tracking_uri)
        self._experiment = _text("experiment_name", experiment_name)
        self._run_name = _text("run_name", run_name)
        self._tags = _text_mapping("tags", tags)
        self._per_layer = validation.boolean("per_layer", per_layer)
        self._timeout = validation.real("flush_timeout", flush_timeout, 0.0, threading.TIMEOUT_MAX)
        try:  # here and not in the worker, where it would race with the imports of the user's script
            import mlflow  # noqa: F401
        except ImportError as error:
            raise ImportError(MISSING) from error

        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the counters and _warned
        self._starts = self._offered = self._delivered = self._lost = 0
        self._warned = False
        self._finished = False  # nothing more is accepted
        self._abandoned = False  # finish() gave up waiting
        self._done = threading.Event()  # the worker has ended
        self._client: Any = None
        self._run_id: str | None = None
        self._owns_run = False
        self._caretaker: RunWatchdog | None = None
        self._experiment_id = "0"
        self._epochs: dict[int, tuple[float, float]] = {}  # bytes sent and dense
        self._windows: dict[int, dict[str, LayerRecord]] = {}

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until it is joined or created."""
        return self._run_id

    @property
    def dropped(self) -> int:
        """Number of values (metrics and parameters) that did not reach MLflow."""
        return self._offered - self._delivered if self._abandoned else self._lost

    def start(self, params: Mapping[str, object]) -> None:
        """Join the run that is active in this thread, or have one created, and log `params`.

        A second optimizer may start the same logger: its parameters get the prefix `optimizer2.`.
        """
        self._starts += 1
        if self._starts == 1 and not self._finished:
            self._find_run()
            atexit.register(self._at_exit)
            threading.Thread(target=self._work, name="MLflowLogger", daemon=True).start()
        prefix = "" if self._starts == 1 else f"optimizer{self._starts}."
        texts = {metric_key(f"{prefix}{k}"): str(v)[:MAX_PARAM_LENGTH] for k, v in params.items()}
        self._put("params", texts)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one epoch at step `epoch`."""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # then there is nothing to draw
            self._epochs[epoch] = (float(metrics["sent_bytes"]), float(metrics["dense_bytes"]))
        self.log_metrics(metrics, epoch)

    def log_window(self, window: int, layers: Mapping[str, LayerRecord]) -> None:
        """Log what each layer did in one detection window, at step `window`."""
        self._windows.setdefault(window, {}).update(layers)
        if self._per_layer:
            self.log_metrics(layer_metrics(layers), window)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics of your own, such as an accuracy. Never waits; what is no number is dropped."""
        values, complaints = metric_values(metrics, 0 if step is None else step, int(time.time() * 1000))
        for complaint in complaints:
            self._offer(1)
            self._lose(1, complaint)
        if values:
            self._put("metrics", values)

    def finish(self, status: str | None = None) -> None:
        """Send what is queued, upload the pictures and end the run if it was created here; once is enough.

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
        self._queue.put(("finish", status or "FINISHED"))
        if not self._done.wait(self._timeout):
            self._abandoned = True  # the worker ends after the call that it hangs in
            self._lose(0, f"no answer within {self._timeout:g} s, {self.dropped} values not sent")
        if self._caretaker is not None:
            self._caretaker.dismiss()

    def __enter__(self) -> MLflowLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if kind is None else "FAILED")

    def _at_exit(self) -> None:
        # Python sets one of these when it goes down on an uncaught exception
        failed = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        self.finish("FAILED" if failed else "FINISHED")

    def _find_run(self) -> None:
        """Look up what belongs to the caller: this thread's active run and MLflow's present settings."""
        import mlflow

        active, default = mlflow.active_run(), mlflow.get_tracking_uri()
        elsewhere = self._uri is not None and self._uri != default
        self._uri = self._uri or default
        if active is not None and not elsewhere:
            self._run_id = active.info.run_id
            return
        self._owns_run = True
        # mlflow.set_experiment() leaves the id in the environment, so it goes before the name; on another
        # server than the one that MLflow is set to, it means nothing
        if self._experiment is None and not (elsewhere and mlflow.is_tracking_uri_set()):
            self._experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        if self._experiment is None and self._experiment_id == "0":
            self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or None

    def _put(self, kind: str, values: Any) -> None:
        self._offer(len(values))
        if self._finished:
            self._lose(len(values), "logged after finish()")
        elif self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put((kind, values))
        else:
            self._lose(len(values), "MLflow is too slow, the queue is full")

    def _offer(self, count: int) -> None:
        with self._lock:
            self._offered += count

    def _lose(self, count: int, reason: str) -> None:
        """Count lost values and warn of the first loss, except on ranks that never start the logger."""
        with self._lock:
            self._lost += count
            first = not self._warned and self._starts > 0
            self._warned = self._warned or first
        if first:
            log.warning("MLflowLogger: %s. Training goes on; `dropped` counts what is lost.", reason)

    # From here on: the worker thread.

    def _work(self) -> None:
        try:
            params: dict[str, str] = {}
            status = None
            while status is None and not self._abandoned:
                values, more, status = self._take()
                params.update(more)  # kept until there is a run: unlike metrics, they come only once
                if self._try(self._connect, lost=len(values)):
                    self._try(self._send_params, params, lost=len(params))
                    params = {}
                    for start in range(0, len(values), MAX_METRICS):
                        chunk = values[start : start + MAX_METRICS]
                        self._try(self._send_metrics, chunk, lost=len(chunk))
            if self._run_id is None:
                self._lose(len(params), "no run")
            elif status is not None and not self._abandoned:
                self._try(self._send_artifacts)
                if self._owns_run:
                    self._try(self._client.set_terminated, self._run_id, status)
        finally:
            self._done.set()

    def _try(self, call: Callable[..., object], *args: Any, lost: int = 0) -> bool:
        try:
            call(*args)
        except Exception as error:
            self._lose(lost, f"{type(error).__name__}: {error}")
            return False
        return True

    def _take(self) -> tuple[list[MetricValue], dict[str, str], str | None]:
        """Wait for a record, then take all that are queued up to about one request of metrics."""
        values: list[MetricValue] = []
        params: dict[str, str] = {}
        kind, payload = self._queue.get()
        while True:
            if kind == "finish":
                return values, params, payload
            if kind == "params":
                params.update(payload)
            else:
                values += payload
            if len(values) >= MAX_METRICS:
                return values, params, None
            try:
                kind, payload = self._queue.get_nowait()
            except queue.Empty:
                return values, params, None

    def _connect(self) -> None:
        """Make sure that there are a client and a run."""
        from mlflow import MlflowClient
        from mlflow.entities import RunTag
        from mlflow.tracking.context.registry import resolve_tags

        if self._client is None:
            client = MlflowClient(tracking_uri=self._uri)
            if self._run_id is not None and self._tags:
                tags = [RunTag(key, value) for key, value in self._tags.items()]
                client.log_batch(self._run_id, tags=tags, synchronous=True)
            self._client = client
        if self._run_id is None:
            if self._experiment is not None:
                self._experiment_id = _experiment_id(self._client, self._experiment)
            # user, script and git commit, as mlflow.start_run() notes them
            tags = resolve_tags(self._tags)
            run = self._client.create_run(self._experiment_id, tags=tags, run_name=self._run_name)
            self._run_id = run.info.run_id
            if not self._abandoned:
                self._caretaker = RunWatchdog(self._client.tracking_uri, run.info.run_id)

    def _send_params(self, params: Mapping[str, str]) -> None:
        """Log parameters. MLflow never changes a parameter: one that the run already has keeps its value."""
        from mlflow.entities import Param

        if not params:
            return
        known = self._client.get_run(self._run_id).data.params
        kept = [key for key, value in params.items() if known.get(key, value) != value]
        if kept:
            log.info("MLflowLogger: the run keeps its own values of the parameters %s", ", ".join(kept))
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), MAX_PARAMS):
            self._client.log_batch(self._run_id, params=fresh[start : start + MAX_PARAMS], synchronous=True)
        self._delivered += len(params)

    def _send_metrics(self, values: Sequence[MetricValue]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run_id, metrics=[Metric(*value) for value in values], synchronous=True)
        self._delivered += len(values)

    def _send_artifacts(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in save_artifacts(folder, dict(self._epochs), dict(self._windows)):
                self._client.log_artifact(self._run_id, path)


def _experiment_id(client: Any, name: str) -> str:
    """Id of the experiment `name`, which is created if missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another job may have created it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


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

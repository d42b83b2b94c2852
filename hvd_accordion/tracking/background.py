"""The thread that talks to MLflow, so that a slow or dead server costs records and never training time."""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd_accordion.tracking.metrics import MetricValue, save_artifacts
from hvd_accordion.tracking.watchdog import RunWatchdog
from hvd_accordion.training.reports import LayerRecord

log = logging.getLogger("hvd_accordion")

MAX_METRICS, MAX_PARAMS = 1000, 100  # per request, limits of MLflow


@dataclass
class Destination:
    """The run to write to. A missing run is created, and ended again, by the thread."""

    uri: str | None = None
    experiment: str | None = None  # name; created if missing
    experiment_id: str = "0"
    run_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    owned: bool = False  # created here, so ended here


class Counts:
    """Values offered, delivered and lost. Warns of the first loss, once `warns` is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False
        self.warns = False
        self.offered = self.delivered = self.lost = 0

    def offer(self, count: int) -> None:
        with self._lock:
            self.offered += count

    def lose(self, count: int, reason: str) -> None:
        with self._lock:
            self.lost += count
            first = not self._warned and self.warns
            self._warned = self._warned or first
        if first:
            log.warning("MLflowLogger: %s. Training goes on; `dropped` counts what is lost.", reason)


class Sender:
    """Takes records from a queue and sends them to MLflow, on a daemon thread.

    Args:
        to: the run; `run_id` is set when the run has been created.
        counts: where delivered and lost values are counted.
        epochs: epoch -> bytes sent and dense bytes, drawn at the end.
        windows: window -> records of the layers, saved and drawn at the end.
    """

    def __init__(
        self,
        to: Destination,
        counts: Counts,
        epochs: Mapping[int, tuple[float, float]],
        windows: Mapping[int, Mapping[str, LayerRecord]],
    ) -> None:
        self.to, self.counts, self.epochs, self.windows = to, counts, epochs, windows
        self.queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.abandoned = False  # the logger has stopped waiting: end after the present call
        self.done = threading.Event()
        self._client: Any = None
        self._watchdog: RunWatchdog | None = None

    def start(self) -> None:
        threading.Thread(target=self._work, name="MLflowLogger", daemon=True).start()

    def finish(self, status: str, timeout: float) -> bool:
        """Sends what is queued and ends a run that was created here. False after `timeout` seconds without an end."""
        self.queue.put(("finish", status))
        self.abandoned = not self.done.wait(timeout)
        return not self.abandoned

    def dismiss_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.dismiss()

    def _work(self) -> None:
        try:
            params: dict[str, str] = {}
            status = None
            while status is None and not self.abandoned:
                values, more, status = self._take()
                params.update(more)  # kept until there is a run: unlike metrics, they come only once
                if self._try(self._connect, lost=len(values)):
                    self._try(self._send_params, params, lost=len(params))
                    params = {}
                    for start in range(0, len(values), MAX_METRICS):
                        chunk = values[start : start + MAX_METRICS]
                        self._try(self._send_metrics, chunk, lost=len(chunk))
            if self.to.run_id is None:
                self.counts.lose(len(params), "no run")
            elif status is not None and not self.abandoned:
                self._try(self._send_artifacts)
                if self.to.owned:
                    self._try(self._client.set_terminated, self.to.run_id, status)
        finally:
            self.done.set()

    def _try(self, call: Callable[..., object], *args: Any, lost: int = 0) -> bool:
        try:
            call(*args)
        except Exception as error:
            self.counts.lose(lost, f"{type(error).__name__}: {error}")
            return False
        return True

    def _take(self) -> tuple[list[MetricValue], dict[str, str], str | None]:
        """Waits for a record, then takes all queued ones up to about one request of metrics."""
        values: list[MetricValue] = []
        params: dict[str, str] = {}
        kind, payload = self.queue.get()
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
                kind, payload = self.queue.get_nowait()
            except queue.Empty:
                return values, params, None

    def _connect(self) -> None:
        """Makes sure that there are a client and a run."""
        from mlflow import MlflowClient
        from mlflow.entities import RunTag
        from mlflow.tracking.context.registry import resolve_tags

        to = self.to
        if self._client is None:
            client = MlflowClient(tracking_uri=to.uri)
            if to.run_id is not None and to.tags:
                tags = [RunTag(key, value) for key, value in to.tags.items()]
                client.log_batch(to.run_id, tags=tags, synchronous=True)
            self._client = client
        if to.run_id is None:
            if to.experiment is not None:
                to.experiment_id = _experiment_id(self._client, to.experiment)
            # user, script and git commit, as mlflow.start_run() notes them
            tags = resolve_tags(dict(to.tags))
            run = self._client.create_run(to.experiment_id, tags=tags, run_name=to.run_name)
            to.run_id = run.info.run_id
            if not self.abandoned:
                self._watchdog = RunWatchdog(self._client.tracking_uri, run.info.run_id)

    def _send_params(self, params: Mapping[str, str]) -> None:
        """Logs parameters. MLflow never changes a parameter: one that the run already has keeps its value."""
        from mlflow.entities import Param

        if not params:
            return
        known = self._client.get_run(self.to.run_id).data.params
        kept = [key for key, value in params.items() if known.get(key, value) != value]
        if kept:
            log.info("MLflowLogger: the run keeps its own values of the parameters %s", ", ".join(kept))
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), MAX_PARAMS):
            self._client.log_batch(self.to.run_id, params=fresh[start : start + MAX_PARAMS], synchronous=True)
        self.counts.delivered += len(params)

    def _send_metrics(self, values: Sequence[MetricValue]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.to.run_id, metrics=[Metric(*value) for value in values], synchronous=True)
        self.counts.delivered += len(values)

    def _send_artifacts(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in save_artifacts(folder, dict(self.epochs), dict(self.windows)):
                self._client.log_artifact(self.to.run_id, path)


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

"""MLflowLogger against a real MLflow database, and against servers that are dead, mute or gone."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from hvd_accordion.tracking import mlflow_logger
from hvd_accordion.tracking.background import Sender
from hvd_accordion.tracking.metrics import layer_metrics, metric_key, metric_values, windows_json
from hvd_accordion.tracking.mlflow_logger import MLflowLogger
from hvd_accordion.training.reports import LayerRecord

DEAD = "http://127.0.0.1:9"  # a port that nobody listens on
# MLflow itself calls deprecated functions of SQLAlchemy
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Nothing is written into the repository; MLflow's settings last for one test."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="hvd_accordion")

    def messages() -> list[str]:
        records = (r for r in caplog.records if r.name == "hvd_accordion" and r.levelno >= logging.WARNING)
        return [record.getMessage() for record in records]

    return messages


def record(regime="critical", norm=2.5, ratio=None):
    return LayerRecord(norm=norm, ratio=ratio, regime=regime, spec="PowerSGD(rank=4)", bytes_per_step=640)


def artifacts(client, run_id):
    return sorted(file.path for file in client.list_artifacts(run_id))


def history(client, run_id, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


# Pure functions


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("module.conv1.weight", "module.conv1.weight"),
        ("dense/kernel:0", "dense/kernel:0"),
        ("a[0](b)#", "a_0__b__"),
        ("/a//./b/", "a/b"),
        ("../x", "__/x"),
        ("", "_"),
        ("é %", "é _"),
    ],
)
def test_metric_key(name, key):
    assert metric_key(name) == key


def test_metric_keys_are_accepted_by_mlflow():
    from mlflow.utils.validation import _validate_metric

    for name in ("a//b", "..", "./.", "x" * 400, "/" * 300, "ab/" * 200, "tab\tquote'", "../" * 100):
        for key in (*layer_metrics({name: record(ratio=0.1)}), metric_key(name)):
            _validate_metric(key, 1.0, 0, 0)


def test_long_keys_stay_distinct():
    long = "block." * 60
    keys = {metric_key(name) for name in (f"a{long}", f"b{long}", f"{long}a", f"{long}b")}
    assert len(keys) == 4 and max(map(len, keys)) <= 250


def test_metric_values_turns_infinity_into_nan_and_complains_of_no_numbers():
    values, bad = metric_values({"a": 1, "b": math.inf, "c": "x", "d": None}, 3, 9)
    assert values[0] == ("a", 1.0, 9, 3)
    assert values[1].key == "b" and math.isnan(values[1].value)
    assert len(bad) == 2 and "'c' must be a number" in bad[0] and "'x'" in bad[0]


def test_windows_json_is_strict_json_in_order():
    text = windows_json({1: {"a": record("relaxed", math.nan, math.inf)}, 0: {"a": record()}})
    first, second = json.loads(text, parse_constant=pytest.fail)
    assert first["window"] == 0 and first["layers"]["a"]["ratio"] is None
    assert second["layers"]["a"] == {
        "norm": "nan",
        "ratio": "inf",
        "regime": "relaxed",
        "spec": "PowerSGD(rank=4)",
        "bytes_per_step": 640,
    }


# A run of its own


@pytest.mark.serial
def test_created_run_holds_everything(uri, client, warnings):
    logger = MLflowLogger(uri, "cifar", "first try", {"team": "a"})
    assert logger.run_id is None
    begin = time.perf_counter()
    logger.start({"eta": 0.5, "critical": "PowerSGD(rank=4)", "long": "x" * 9000})
    for epoch in range(3):
        logger.log_epoch(epoch, {"sent_bytes": 1e6 * (epoch + 1), "dense_bytes": 9e6})
        logger.log_metrics({"accuracy": 0.1 * epoch}, step=epoch)
    logger.log_window(0, {"conv[1]": record(), "fc": record()})
    logger.log_window(1, {"conv[1]": record("relaxed", 2.0, 0.2), "fc": record("critical", 1.0, 0.6)})
    assert time.perf_counter() - begin < 0.5
    logger.finish()

    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first try"
    assert client.get_experiment(run.info.experiment_id).name == "cifar"
    assert run.data.tags["team"] == "a" and "mlflow.source.name" in run.data.tags
    assert run.data.params == {"eta": "0.5", "critical": "PowerSGD(rank=4)", "long": "x" * 6000}
    assert history(client, logger.run_id, "sent_bytes") == [(0, 1e6), (1, 2e6), (2, 3e6)]
    assert history(client, logger.run_id, "accuracy") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert history(client, logger.run_id, "layer/conv_1_/norm") == [(0, 2.5), (1, 2.0)]
    assert history(client, logger.run_id, "layer/conv_1_/critical") == [(0, 1.0), (1, 0.0)]
    assert history(client, logger.run_id, "layer/fc/ratio") == [(1, 0.6)]
    assert artifacts(client, logger.run_id) == ["compression.png", "regimes.json", "regimes.png"]
    path = mlflow.artifacts.download_artifacts(f"runs:/{logger.run_id}/regimes.json", tracking_uri=uri)
    rows = json.loads(Path(path).read_text())
    assert [row["layers"]["conv[1]"]["regime"] for row in rows] == ["critical", "relaxed"]
    assert logger.dropped == 0 and warnings() == []


def test_pictures_without_data_are_left_out(uri, client, warnings):
    epochs_only = MLflowLogger(uri)
    epochs_only.start({})
    epochs_only.log_epoch(0, {"sent_bytes": 1e6, "dense_bytes": 2e6})
    epochs_only.finish()
    assert artifacts(client, epochs_only.run_id) == ["compression.png"]

    no_layer_metrics = MLflowLogger(uri, per_layer=False)
    no_layer_metrics.start({})
    no_layer_metrics.log_epoch(0, {"loss": 1.0})
    no_layer_metrics.log_window(0, {"fc": record()})
    no_layer_metrics.finish()
    assert artifacts(client, no_layer_metrics.run_id) == ["regimes.json", "regimes.png"]
    assert client.get_run(no_layer_metrics.run_id).data.metrics == {"loss": 1.0}
    assert warnings() == []


def test_nan_and_infinite_norms_break_no_batch(uri, client, warnings):
    logger = MLflowLogger(uri)
    logger.start({})
    layers = {"a": record(norm=math.nan), "b": record(norm=math.inf, ratio=-math.inf), "c": record()}
    logger.log_window(0, layers)
    logger.log_window(1, layers)
    logger.finish()
    metrics = client.get_run(logger.run_id).data.metrics
    assert math.isnan(metrics["layer/a/norm"]) and math.isnan(metrics["layer/b/norm"])
    assert metrics["layer/c/norm"] == 2.5 and metrics["layer/b/critical"] == 1.0
    assert artifacts(client, logger.run_id) == ["regimes.json", "regimes.png"]
    assert logger.dropped == 0 and warnings() == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_finish_with_a_status(uri, client, status):
    logger = MLflowLogger(uri)
    logger.start({})
    logger.finish(status)
    logger.finish("FINISHED")  # too late
    assert client.get_run(logger.run_id).info.status == status


def test_with_block(uri, client):
    with MLflowLogger(uri) as good:
        good.start({})
    with pytest.raises(ZeroDivisionError), MLflowLogger(uri) as bad:
        bad.start({})
        raise ZeroDivisionError
    assert client.get_run(good.run_id).info.status == "FINISHED"
    assert client.get_run(bad.run_id).info.status == "FAILED"


@pytest.mark.parametrize(("last", "status", "code"), [("", "FINISHED", 0), ("raise RuntimeError('boom')", "FAILED", 1)])
def test_end_of_python_ends_the_run(uri, client, tmp_path, last, status, code):
    script = f"""
from hvd_accordion import MLflowLogger
logger = MLflowLogger({uri!r}, "at exit", {status!r})
logger.start({{"lr": 0.1}})
logger.log_epoch(0, {{"sent_bytes": 1e6, "dense_bytes": 2e6}})
{last}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    experiment = client.get_experiment_by_name("at exit")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{status}'")
    assert run.info.status == status and run.data.params == {"lr": "0.1"}
    assert artifacts(client, run.info.run_id) == ["compression.png"]


def test_experiment_follows_mlflow_settings(uri, client, monkeypatch):
    def experiment_of(**arguments):
        with MLflowLogger(**arguments) as logger:
            logger.start({})
        return client.get_experiment(client.get_run(logger.run_id).info.experiment_id).name

    assert experiment_of(tracking_uri=uri) == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from env")
    assert experiment_of(tracking_uri=uri) == "from env"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("set by user")
    assert experiment_of() == "set by user"
    assert experiment_of(experiment_name="by argument") == "by argument"
    mlflow.set_tracking_uri(DEAD)  # so the experiment that is set belongs to another server
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert experiment_of(tracking_uri=uri) == "Default"


def test_second_optimizer_logs_params_with_a_prefix(uri, client):
    with MLflowLogger(uri) as logger:
        logger.start({"eta": 0.5})
        logger.start({"eta": 0.7})
        logger.log_window(0, {"generator": record()})
        logger.log_window(0, {"critic": record("relaxed")})
    assert client.get_run(logger.run_id).data.params == {"eta": "0.5", "optimizer2.eta": "0.7"}
    path = mlflow.artifacts.download_artifacts(f"runs:/{logger.run_id}/regimes.json", tracking_uri=uri)
    (row,) = json.loads(Path(path).read_text())
    assert list(row["layers"]) == ["generator", "critic"]


# A run of the user's


@pytest.mark.parametrize("own_uri", [False, True])
def test_active_run_is_joined_and_left_open(uri, client, warnings, own_uri):
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run() as run:
        mlflow.log_param("lr", 0.1)
        logger = MLflowLogger(uri if own_uri else None, tags={"joined": "yes"})
        logger.start({"lr": 0.2, "eta": 0.5})
        assert logger.run_id == run.info.run_id
        logger.log_epoch(0, {"sent_bytes": 1e6, "dense_bytes": 2e6})
        logger.finish()
        assert client.get_run(logger.run_id).info.status == "RUNNING"
    data = client.get_run(logger.run_id).data
    assert data.params == {"lr": "0.1", "eta": "0.5"} and data.tags["joined"] == "yes"
    assert data.metrics == {"sent_bytes": 1e6, "dense_bytes": 2e6}
    assert artifacts(client, logger.run_id) == ["compression.png"]
    assert logger.dropped == 0 and warnings() == []


def test_run_that_the_user_has_ended_still_gets_the_pictures(uri, client, warnings):
    mlflow.set_tracking_uri(uri)
    logger = MLflowLogger()
    with mlflow.start_run():
        logger.start({})
        logger.log_window(0, {"fc": record()})
    logger.finish("FAILED")
    assert artifacts(client, logger.run_id) == ["regimes.json", "regimes.png"]
    assert client.get_run(logger.run_id).info.status == "FINISHED" and warnings() == []


def test_active_run_elsewhere_is_not_joined(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run():
        logger = MLflowLogger(DEAD)
        logger.start({})
        logger.finish()
    assert logger.run_id is None


# Servers in trouble


def use(logger):
    """One short training; returns how long the calls took and how many values were logged."""
    begin = time.perf_counter()
    logger.start({"lr": 0.1})
    for epoch in range(5):
        logger.log_epoch(epoch, {"sent_bytes": 1e6, "dense_bytes": 2e6})
        logger.log_window(epoch, {"fc": record()})
    return time.perf_counter() - begin, 1 + 5 * 4


@pytest.mark.serial
@pytest.mark.parametrize("server", ["dead", "mute"])
def test_training_does_not_wait_for_a_server(server, warnings):
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, never answers
        address = DEAD if server == "dead" else f"http://127.0.0.1:{mute.getsockname()[1]}"
        logger = MLflowLogger(address, flush_timeout=1.0)
        seconds, values = use(logger)
        assert seconds < 0.2
        begin = time.perf_counter()
        logger.finish()
        assert 0.9 < time.perf_counter() - begin < 2.0  # MLflow goes on trying for minutes
    assert logger.dropped == values
    (warning,) = warnings()
    assert "no answer within 1 s, 21 values not sent" in warning


def test_refused_connection_ends_finish_early_with_one_warning(monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = MLflowLogger(DEAD, "some experiment", flush_timeout=60.0)
    _, values = use(logger)
    time.sleep(0.3)
    logger.log_metrics({"accuracy": 0.5})
    begin = time.perf_counter()
    logger.finish()
    assert time.perf_counter() - begin < 20
    assert logger.dropped == values + 1
    (warning,) = warnings()
    assert "refused" in warning


def test_python_exits_in_spite_of_a_dead_server():
    script = f"""
from hvd_accordion import MLflowLogger
MLflowLogger({DEAD!r}, flush_timeout=0.5).start({{}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflowLogger:") == 1


def test_records_after_a_failure_arrive(uri, client, monkeypatch, warnings):
    create, failures = mlflow.MlflowClient.create_run, [ConnectionError("first"), ConnectionError("second")]
    failed = threading.Event()

    def flaky(self, *args, **kwargs):
        if failures:
            error = failures.pop(0)
            if not failures:
                failed.set()
            raise error
        return create(self, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", flaky)
    logger = MLflowLogger(uri)
    logger.start({"lr": 0.1})
    while not failed.wait(0.05):
        logger.log_metrics({"lost": 1.0})
    time.sleep(0.1)
    logger.log_metrics({"kept": 2.0}, step=7)
    logger.finish()
    run = client.get_run(logger.run_id)
    assert run.data.params == {"lr": "0.1"} and run.data.metrics["kept"] == 2.0
    assert logger.dropped >= 1 and len(warnings()) == 1 and "first" in warnings()[0]


@pytest.fixture
def hold(monkeypatch):
    """Starts a logger with a worker that stops before it connects; returns what lets the worker go on."""
    release, held, connect = threading.Event(), threading.Event(), Sender._connect

    def wait(self):
        held.set()
        release.wait(30)
        connect(self)

    def start(logger):
        logger.start({})
        assert held.wait(30)
        return release.set

    monkeypatch.setattr(Sender, "_connect", wait)
    yield start
    release.set()


def test_full_queue_drops_and_counts(uri, client, hold, monkeypatch, warnings):
    monkeypatch.setattr(mlflow_logger, "QUEUE_LIMIT", 5)
    logger = MLflowLogger(uri)
    release = hold(logger)
    for step in range(20):
        logger.log_metrics({"a": step, "b": step}, step)
    release()
    logger.finish()
    assert history(client, logger.run_id, "a") == [(step, step) for step in range(5)]
    assert logger.dropped == 30
    (warning,) = warnings()
    assert "queue is full" in warning


def test_queued_metrics_share_requests(uri, client, hold, monkeypatch):
    sizes, log_batch = [], mlflow.MlflowClient.log_batch

    def spy(self, run_id, metrics=(), **kwargs):
        sizes.append(len(metrics))
        return log_batch(self, run_id, metrics=metrics, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", spy)
    logger = MLflowLogger(uri)
    release = hold(logger)
    for step in range(900):
        logger.log_metrics({"a": step, "b": step, "c": step}, step)
    release()
    logger.finish()
    assert sum(sizes) == 2700 and max(sizes) <= 1000 and len(sizes) <= 6
    assert history(client, logger.run_id, "c") == [(step, step) for step in range(900)]


# Use and misuse


def test_values_that_are_no_numbers_are_dropped(uri, client, warnings):
    with MLflowLogger(uri) as logger:
        logger.start({})
        logger.log_metrics({"a": "many", "b": 1.0})
        logger.log_metrics({"c": None})
    assert client.get_run(logger.run_id).data.metrics == {"b": 1.0}
    (warning,) = warnings()
    assert "metric 'a' must be a number" in warning and logger.dropped == 2


def test_logger_that_is_never_started_is_silent(monkeypatch, warnings):
    monkeypatch.setattr(mlflow_logger, "QUEUE_LIMIT", 2)
    with MLflowLogger(DEAD) as logger:  # as on all ranks but 0
        for _ in range(5):
            logger.log_metrics({"accuracy": 0.5})
    logger.finish()
    assert warnings() == [] and logger.run_id is None


def test_metrics_before_start_and_after_finish(uri, client, warnings):
    logger = MLflowLogger(uri)
    logger.log_metrics({"early": 1.0})
    logger.start({})
    logger.finish()
    logger.log_metrics({"late": 1.0})
    logger.start({"lr": 0.1})
    assert client.get_run(logger.run_id).data.metrics == {"early": 1.0}
    assert logger.dropped == 2 and len(warnings()) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tracking_uri": 3}, TypeError, "tracking_uri must be a string or None, got 3"),
        ({"tracking_uri": ""}, ValueError, "tracking_uri must be a non-empty string or None, got ''"),
        ({"experiment_name": b"x"}, TypeError, "experiment_name must be a string or None, got b'x'"),
        ({"run_name": 1.5}, TypeError, "run_name must be a string or None, got 1.5"),
        ({"tags": ["a"]}, TypeError, "tags must be a mapping of strings to strings or None, got ['a']"),
        ({"tags": {"a": 1}}, TypeError, "tags must be a mapping of strings to strings or None, got {'a': 1}"),
        ({"per_layer": 1}, TypeError, "per_layer must be True or False, got 1"),
        ({"flush_timeout": "5"}, TypeError, "flush_timeout must be a number in (0, "),
        ({"flush_timeout": 0}, ValueError, "flush_timeout must be a number in (0, "),
        ({"flush_timeout": math.nan}, ValueError, "flush_timeout must be a number in (0, "),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MLflowLogger(**arguments)


def test_bad_status():
    with pytest.raises(ValueError, match="status must be one of 'FINISHED', 'FAILED', 'KILLED', got 'OK'"):
        MLflowLogger().finish("OK")


def test_missing_mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    message = "MLflowLogger needs mlflow: pip install hvd_accordion[mlflow]"
    with pytest.raises(ImportError, match=re.escape(message)):
        MLflowLogger()


def test_importing_the_module_imports_neither_mlflow_nor_matplotlib():
    code = "import sys, hvd_accordion.tracking.mlflow_logger; assert not {'mlflow', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

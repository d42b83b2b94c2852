"""A real MLflow server on loopback, with a database, artifacts and users: what trainings of two ranks leave there.

Users and passwords are those of MLflow's own basic-auth app, which needs Flask-WTF; without it the server asks nobody.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parallel.launcher import end, worker

mlflow = pytest.importorskip("mlflow")

from hvd_accordion.tracking.mlflow_logger import MLflowLogger  # noqa: E402

LIFETIME = 500  # seconds after which a server ends, whatever became of this process
AUTHENTICATES = importlib.util.find_spec("flask_wtf") is not None
ADMIN, USER = ("admin", "the first password"), ("ada", "a password of hers")
SETTINGS = """
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{folder}/users.db
admin_username = admin
"""
pytestmark = [
    pytest.mark.parallel,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow itself calls deprecated functions of SQLAlchemy
]


@dataclass
class Server:
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    mark: str

    @property
    def database(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def stop(self) -> None:
        """All its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        end(self.mark)
        self.process.wait(10)

    def request(self, method: str, path: str, body: object = None, user: tuple[str, str] | None = None) -> int:
        """HTTP status of the answer; 0 where nobody answers."""
        headers = {"Content-Type": "application/json"}
        if user is not None:
            headers["Authorization"] = "Basic " + b64encode(":".join(user).encode()).decode()
        connection = http.client.HTTPConnection(urllib.parse.urlparse(self.address).netloc, timeout=20)
        with contextlib.closing(connection):
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                return connection.getresponse().status
            except OSError:
                return 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, mark = tmp_path_factory.mktemp("server"), uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "auth.ini").write_text(SETTINGS.format(folder=folder))
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    command += ["--app-name", "basic-auth"] * AUTHENTICATES
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["timeout", "--signal=KILL", str(LIFETIME), *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HVD_ACCORDION_TEST_RUN": mark,
                "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
                "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": mark,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", folder, process, mark)
    try:
        deadline = time.monotonic() + 200  # MLflow sets up its databases first; on two busy cores that takes its time
        while server.request("GET", "/health") != 200:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        if AUTHENTICATES:
            user = {"username": USER[0], "password": USER[1]}
            assert server.request("POST", "/api/2.0/mlflow/users/create", user, ADMIN) == 200
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def as_user(tmp_path, monkeypatch):
    """MLflow's own settings name the user; nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", USER[1])


def only_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_a_training_arrives(server, tmp_path):
    # rank 0 compares there what it reads back with what its optimizer counted
    worker(
        "torch/logging_run", ranks=2, timeout=200, only="holds", LOGS=str(tmp_path), TEST_TRACKING_URI=server.address
    )
    client = mlflow.MlflowClient(server.address)
    run = only_run(client, "e")
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")  # so they went through the server
    for picture in ("compression.png", "regimes.png"):
        data = Path(client.download_artifacts(run.info.run_id, picture, str(tmp_path))).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    kept = sorted(path.name for path in (server.folder / "artifacts").rglob("*") if path.is_file())
    assert kept == ["compression.png", "regimes.json", "regimes.png"]


@pytest.mark.skipif(not AUTHENTICATES, reason="MLflow's basic-auth needs flask-wtf")
@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_server_that_refuses_costs_one_warning(server, password, monkeypatch, caplog):
    if password is None:
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    logger = MLflowLogger(server.address, "refused")
    logger.start({"lr": 0.1})
    logger.log_epoch(0, {"sent_bytes": 1.0, "dense_bytes": 2.0})
    begin = time.monotonic()
    logger.finish()
    assert time.monotonic() - begin < 20
    assert logger.run_id is None and logger.dropped == 3
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "hvd_accordion")
    assert "401" in warning or "authenticated" in warning


def test_a_killed_training_is_marked_on_the_server(server):
    """Its watchdog logs in as the training did."""
    code = f"""
import os, signal, time
from hvd_accordion import MLflowLogger
logger = MLflowLogger({server.address!r}, "killed")
logger.start({{"lr": 0.1}})
while not logger.delivered:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == -signal.SIGKILL
    client, deadline = mlflow.MlflowClient(server.address), time.monotonic() + 60
    while only_run(client, "killed").info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert only_run(client, "killed").info.status == "FAILED"


def test_a_server_that_stops_in_mid_training_costs_records_alone(server, tmp_path):
    """The last test of this file: the server is gone after it."""
    with ThreadPoolExecutor(1) as pool:
        arguments = {"LOGS": str(tmp_path), "TEST_TRACKING_URI": server.address}
        training = pool.submit(worker, "torch/logging_stopped", 2, "gloo", 200, **arguments)
        while not (tmp_path / "logged").exists():
            assert not training.done(), training.result()
            time.sleep(0.1)
        server.stop()
        assert server.request("GET", "/health") == 0
        (tmp_path / "stopped").touch()
        training.result()  # the rest of the training is checked on its ranks
    client = mlflow.MlflowClient(server.database)
    run = only_run(client, "stopped")
    assert run.info.status == "RUNNING"  # nobody was there to be told
    logged = client.get_metric_history(run.info.run_id, "sent_bytes")
    assert [metric.step for metric in logged][:10] == list(range(10))

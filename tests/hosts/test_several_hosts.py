"""Trainings on several hosts over ssh: what arrives, what is sent, and what is left when a host's link is cut."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

WORKERS = Path(__file__).parent / "workers"
GLOO_TIMEOUT = 10  # seconds; of a collective, and of the ranks' first meeting
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "--color=no", "-p", "no:cacheprovider", "-c", "/dev/null"]
LOST = {
    "gloo": r"horovod.common.exceptions.HorovodInternalError: ",
    "mpi": r"ORTE has lost communication with a remote daemon[\s\S]*on node node2",
}
pytestmark = [
    pytest.mark.parallel,
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow itself calls deprecated functions of SQLAlchemy
]


@pytest.mark.parametrize(("count", "transport"), [(2, "gloo"), (4, "mpi")])
def test_training(bring_up, count, transport):
    hosts = bring_up(count)
    # Horovod's ranks talk once a cycle, sent or not: few cycles, or a slow machine counts too much of that
    settings = {"TEST_HOSTS": str(count), "HOROVOD_CYCLE_TIME": "20", "PYTEST_ADDOPTS": ""}  # those are for this pytest
    job = hosts.launch([*PYTEST, str(WORKERS / "training.py")], transport, **settings)
    ended = hosts.await_end(job, 150)
    assert ended.status == 0, ended.output
    assert len(re.findall(r"\b3 passed", ended.output)) == count, ended.output
    hosts.await_nothing_running(10)


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_a_cut_link_ends_the_training_and_fails_its_run(bring_up, transport, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts where it sets up the database
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    hosts = bring_up(2)
    settings = {"TEST_FOLDER": str(tmp_path), "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT)}
    job = hosts.launch([sys.executable, str(WORKERS / "cut_off.py")], transport, **settings)
    run_id = await_file(tmp_path / "run", job, hosts)
    assert client.get_run(run_id).info.status == "RUNNING"

    hosts.cut(1)
    ended = hosts.await_end(job, 2 * GLOO_TIMEOUT + 20)  # of silence and, on two busy cores, of its aftermath
    assert ended.status != 0
    assert re.search(LOST[transport], ended.output), ended.output
    hosts.await_nothing_running(30)  # neither on the host that is cut off
    run = client.get_run(run_id)
    assert run.info.status == "FAILED" and run.info.end_time is not None
    sent = client.get_metric_history(run_id, "sent_bytes")
    assert [metric.step for metric in sent[:4]] == [0, 1, 2, 3]  # what was logged before stays


def await_file(path, job, hosts, timeout=90):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert job.poll() is None and time.monotonic() < deadline, hosts.output()
        time.sleep(0.1)
    return path.read_text()

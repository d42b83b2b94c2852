"""A training that is killed leaves its MLflow run FAILED; one that ends leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from hvd_accordion.tracking.watchdog import RunWatchdog

# MLflow itself calls deprecated functions of SQLAlchemy
pytestmark = [pytest.mark.serial, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# forks, as data loaders do: what it forks holds copies of all that it has open
TRAINING = """
import os, sys, time
from hvd_accordion import MLflowLogger
logger = MLflowLogger(sys.argv[1])
logger.start({"lr": 0.1})
while not logger.delivered:  # by then the run has its watchdog
    time.sleep(0.05)
if sys.argv[2] == "forks":
    ready, left_group = os.pipe()
    if not os.fork():
        os.setsid()
        os.write(left_group, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)  # else the child may be killed with the group
print(logger.run_id, flush=True)
time.sleep(60)
"""


@pytest.fixture
def mark(monkeypatch):
    """A mark in the environment of all that the test starts; what is left of it is killed."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("HVD_ACCORDION_TEST_CARETAKER", mark)
    yield mark
    for process in marked(mark):
        process.kill()


def marked(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("HVD_ACCORDION_TEST_CARETAKER") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def ended(mark, but=0, timeout=60.0):
    """Whether all that carries the mark, but so many, ends in time."""
    deadline = time.monotonic() + timeout
    while len(marked(mark)) > but:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_killed_training_leaves_a_failed_run(uri, client, mark):
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, uri, "forks"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    run_id = training.stdout.readline().strip()
    assert client.get_run(run_id).info.status == "RUNNING"
    begin = time.time()
    os.killpg(training.pid, signal.SIGKILL)  # the whole group, as launchers do
    assert training.wait(10) == -signal.SIGKILL
    training.stdout.close()
    assert ended(mark, but=1)  # what it forked
    run = client.get_run(run_id)
    assert run.info.status == "FAILED" and begin - 1 < run.info.end_time / 1000 < time.time() + 1
    assert run.data.params == {"lr": "0.1"}


def test_so_does_one_whose_processes_are_all_terminated(uri, client, mark):
    training = subprocess.Popen([sys.executable, "-c", TRAINING, uri, ""], stdout=subprocess.PIPE, text=True)
    run_id = training.stdout.readline().strip()
    (watchdog,) = (process for process in marked(mark) if process.pid != training.pid)
    wait_until_ignoring(watchdog)
    watchdog.terminate()
    training.terminate()
    assert training.wait(10) == -signal.SIGTERM
    training.stdout.close()
    assert ended(mark)
    assert client.get_run(run_id).info.status == "FAILED"


def wait_until_ignoring(process, timeout=10.0):
    """Until the process has got to the line that ignores SIGTERM."""
    deadline = time.monotonic() + timeout
    while True:
        with open(f"/proc/{process.pid}/status") as status:
            ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn"))
        if ignored >> (signal.SIGTERM - 1) & 1:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_dismissed_it_leaves_the_run_alone(uri, client, mark):
    run_id = client.create_run("0").info.run_id
    watchdog = RunWatchdog(uri, run_id)
    assert len(marked(mark)) == 1
    watchdog.dismiss()
    watchdog.dismiss()
    assert not marked(mark)
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_run_that_somebody_else_ended_stays_as_it_is(uri, client, mark):
    run_id = client.create_run("0").info.run_id
    code = f"""
import os
from hvd_accordion.tracking.watchdog import RunWatchdog
RunWatchdog({uri!r}, {run_id!r})
input()
os._exit(3)
"""
    training = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    client.set_terminated(run_id, "KILLED")
    training.communicate(b"\n", timeout=60)
    assert training.returncode == 3
    assert ended(mark)
    assert client.get_run(run_id).info.status == "KILLED"


def test_the_password_in_an_address_is_not_among_the_arguments(mark):
    watchdog = RunWatchdog("http://user:secret@127.0.0.1:9", "a run")
    try:
        (process,) = marked(mark)
        assert not any("secret" in argument for argument in process.cmdline())
    finally:
        watchdog.dismiss()

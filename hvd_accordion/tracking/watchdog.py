"""Marks an MLflow run FAILED after its training process was killed.

A killed rank runs no Python any more: launchers kill all ranks when one host is lost, MPI aborts, memory runs out. So a
small separate process waits for the end of the training process. It imports MLflow only then.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

# MLflow may wait long for a server: the alarm ends that. The parent's id is polled instead of a pipe, for the forks of
# the training hold a copy of every pipe.
WATCH = """
import os, signal, sys, time
run_id, parent = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler sends it to all of a job's processes
while os.getppid() == parent:
    time.sleep(1)
signal.alarm(60)
from mlflow import MlflowClient
client = MlflowClient()
if client.get_run(run_id).info.status == "RUNNING":
    client.set_terminated(run_id, "FAILED")
"""


class RunWatchdog:
    """Waits for the end of this process, then marks the run FAILED, unless it is dismissed before.

    Args:
        tracking_uri: MLflow server or database that holds the run.
        run_id: id of the run.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WATCH, run_id, str(os.getpid())],
            # not an argument, which every user of the machine can read: it may hold a password
            env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a launcher waits until every process has closed its pipes
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # signals to the training's process group do not reach it
        )

    def dismiss(self) -> None:
        """Ends the watch. May be called again."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

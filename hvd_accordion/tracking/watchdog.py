"""Marks an MLflow run FAILED when its training dies without a word.

A rank that is killed runs no Python any more: launchers kill all ranks once one host is lost, MPI aborts, memory runs
out. So a small process of its own waits for the training's death. It imports nothing of weight before that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

# MLflow may take long to give up on a server: the alarm ends that. The run's parent process is looked at, rather than a
# pipe's end, for what the training forks holds a copy of every pipe.
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
    """Waits for the death of this process, then marks the run FAILED, unless it is dismissed before.

    Args:
        tracking_uri: MLflow server or database that holds the run.
        run_id: id of the run.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WATCH, run_id, str(os.getpid())],
            # not among the arguments, which everybody on the machine can read: it may hold a password
            env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a launcher waits until nobody holds its pipes any more
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what kills the training's group doesn't reach it
        )

    def dismiss(self) -> None:
        """Nothing is left to do; may be called again."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

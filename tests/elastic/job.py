"""Runs a script as an elastic job whose workers come, go and die, with a hard time limit after which none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.elastic.changes import names
from tests.parallel.launcher import end, marked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # what workers import lies in tests/
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTRAOP_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "HOROVOD_FUSION_THRESHOLD": "0",  # the order of a sum is that of the ranks, whatever Horovod would fuse
    # how long ranks wait for one that comes, and survivors for each other when one has seen before that a peer died
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "20",
}


def run(
    script: str, folder: Path, start: int, changes: Sequence[str], timeout: float = 120.0, **env: str
) -> list[dict[str, Any]]:
    """What the workers of workers/SCRIPT.py recorded, in order. AssertionError with the output if they fail or take too long.

    Args:
        folder: of the job, empty.
        start: number of workers.
        changes: see `changes`; the script calls `Changes` in its steps.
        timeout: seconds.
    """
    mark = uuid.uuid4().hex
    hosts = folder / "hosts"
    hosts.write_text("\n".join(names(folder, start)))
    plan = json.dumps({"start": start, "changes": changes, "folder": str(folder)})
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / "launch.py"), str(hosts), "1", "9"]
    process = subprocess.Popen(
        [*command, sys.executable, str(HERE / "workers" / f"{script}.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": path,
            "ELASTIC_PLAN": plan,
            "HVD_ACCORDION_TEST_RUN": mark,
            **env,
        },
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        tell_where(mark)
        end(mark)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output}\n{_events(folder)[-10:]}") from None
    finally:
        end(mark)
    assert process.returncode == 0, f"exit status {process.returncode}:\n{output}"
    return _events(folder)


def tell_where(mark: str) -> None:
    """Lets launcher and workers write the stacks of their threads into the output, where they hang."""
    for process in marked(mark):
        try:
            name, *arguments = process.cmdline()
            if name == sys.executable and any(str(HERE) in argument for argument in arguments):
                process.send_signal(signal.SIGUSR1)
        except (psutil.NoSuchProcess, ValueError):
            pass
    time.sleep(1)


def _events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

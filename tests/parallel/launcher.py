"""Runs a pytest file on several ranks, with a hard time limit after which no process of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import IO

import psutil

WORKERS = Path(__file__).parent / "workers"
# what warns on a rank is no failure: frameworks and trainers, which are not ours, do
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "no:randomly"]
HOROVODRUN = Path(sys.executable).parent / "horovodrun"


def horovodrun(command: list[str], ranks: int, transport: str = "mpi", timeout: float = 120.0, **env: str) -> str:
    """Output of `command` on `ranks` local ranks. AssertionError with the output if it fails or takes too long."""
    start = [str(HOROVODRUN), "-np", str(ranks), "-H", f"localhost:{ranks}", f"--{transport}"]
    return run([*start, *command], timeout, **{**environment_of(ranks), **env})


def started(command: list[str], ranks: int, transport: str, timeout: float, **env: str) -> str:
    """The same without horovodrun, which imports all frameworks before it starts a rank."""
    return run(launch_command(command, ranks, transport), timeout, **{**environment_of(ranks), **env})


def launch_command(command: list[str], ranks: int, transport: str) -> list[str]:
    if transport == "gloo":
        return [sys.executable, str(Path(__file__).parent / "gloo_ranks.py"), str(ranks), *command]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "-bind-to", "none", "-np", str(ranks), *command]


def environment_of(ranks: int) -> dict[str, str]:
    return {
        "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores
        # from three ranks on, the order of a sum depends on what Horovod happens to fuse; here runs are compared bit by bit
        **({"HOROVOD_FUSION_THRESHOLD": "0"} if ranks > 2 else {}),
    }


def run(command: list[str], timeout: float = 120.0, **env: str) -> str:
    """Output of a command that starts ranks. AssertionError with the output if it fails or takes too long."""
    process, mark = begin(command, subprocess.PIPE, **env)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(mark)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output}") from None
    finally:
        end(mark)
    assert process.returncode == 0, f"exit status {process.returncode}:\n{output}"
    return output


def begin(command: list[str], output: int | IO[str], **env: str) -> tuple[subprocess.Popen[str], str]:
    """Starts a command that starts ranks; `end` of the second result ends all its processes."""
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "PYTHONUNBUFFERED": "1",
        "HVD_ACCORDION_TEST_RUN": mark,
        **env,
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    return process, mark


def end(mark: str) -> None:
    """Kills every process that this run started, and only those (they carry its mark), and waits until they are gone."""
    for _ in range(10):  # a dying launcher may still start one
        left = marked(mark)
        if not left:
            return
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=5)


def marked(mark: str, variable: str = "HVD_ACCORDION_TEST_RUN") -> list[psutil.Process]:
    """Processes whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(variable) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def worker(name: str, ranks: int, transport: str = "mpi", timeout: float = 120.0, only: str = "", **env: str) -> str:
    """Runs the tests of workers/NAME.py on every rank; `only`: those whose names match, as pytest's -k."""
    file = WORKERS / f"{name}.py"
    return started([*PYTEST, str(file)] + ["-k", only] * bool(only), ranks, transport, timeout, **env)

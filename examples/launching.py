"""Starts the ranks of a training, shows their progress, and leaves no process behind, however the training ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {  # the same for all trainings
    "HOROVOD_CYCLE_TIME": "1",  # ms, Horovod's default
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # horovodrun imports TensorFlow if it is installed
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
TAG = re.compile(r"\[[\d,]+\]<std(?:out|err)>:")  # horovodrun puts one before each write of a rank
BAR = re.compile(r"\d+%\|")


def horovodrun(ranks: int, *options: str) -> list[str]:
    """The words that start `ranks` of the command after them, with this Python's horovodrun."""
    return [str(Path(sys.executable).with_name("horovodrun")), "-np", str(ranks), *options]


def local(ranks: int) -> list[str]:
    """The same by mpirun where it is there: horovodrun imports TensorFlow twice before it starts a rank."""
    if not (mpirun := shutil.which("mpirun")):
        return horovodrun(ranks)
    return [mpirun, "--allow-run-as-root", "--oversubscribe", "-bind-to", "none", "-np", str(ranks)]


def run(
    command: Sequence[str],
    log: Path,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str | None:
    """Runs a command with its output appended to `log` and its stderr shown. Returns why it failed; None if it did not."""
    begin = time.monotonic()
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, stop, [process])
        timer.daemon = True
        timer.start()
        with process:
            try:
                show(process.stderr, file)
                code = process.wait()
            finally:
                timer.cancel()
                stop(process)
    if not code:
        return None
    late = timeout is not None and time.monotonic() - begin >= timeout
    return f"took longer than {timeout:g} s" if late else f"ended with exit status {code}"


def show(stream: Any, log: Any) -> None:
    """Copies stderr without tags. A terminal shows the progress bar in one line; elsewhere only its last state appears."""
    live, bar, width = sys.stderr.isatty(), "", shutil.get_terminal_size().columns - 1
    for line in lines_of(stream):
        if BAR.search(line):
            bar = line
            sys.stderr.write(f"\r{bar[:width]}" if live else "")
        else:
            os.write(log.fileno(), line.encode() + b"\n")
            sys.stderr.write(f"\n{line}\n" if live and bar else f"{line}\n")
        sys.stderr.flush()
    sys.stderr.write("\n" if live else f"{bar}\n" if bar else "")


def lines_of(stream: Any) -> Iterator[str]:
    """The pieces between returns and newlines, without tags, each as soon as it is complete."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        *done, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from filter(None, (TAG.sub("", part.decode(errors="replace")).rstrip() for part in done))
    if rest:
        yield TAG.sub("", rest.decode(errors="replace"))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of a session: mpirun gives each rank a process group, but not a session."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        while session(process.pid):
            process.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def session(leader: int) -> list[int]:
    """Processes of the session that began with `leader`."""
    members = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(pid)) == leader:
                members.append(int(pid))
    return members


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Makes the folder `out` and locks it until the end. SystemExit if another process holds the lock."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{Path(sys.argv[0]).stem}: another one is running and writes to {out}")
        yield

"""Starts trainings under horovodrun, one after the other, each in a session of its own of which nothing is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo import ENVIRONMENT, show, stop

from accordion_paper.experiments import Run


def finished(run: Run, ranks: int, out: Path) -> dict[str, Any] | None:
    """The result of an earlier training with the same settings, if it came to its end."""
    try:
        result = json.loads((out / f"{run.stem}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result if result["settings"] == run.settings(ranks) else None


def start(
    run: Run, ranks: int, out: Path, command: Sequence[str], hosts: str | None = None, timeout: float | None = None
) -> None:
    """Trains under horovodrun, with a log in `out`. SystemExit, which says why, where it fails or takes too long."""
    horovodrun = Path(sys.executable).with_name("horovodrun")
    where = ["-H", hosts] if hosts else []
    log = out / f"{run.stem}.log"
    begin = time.monotonic()
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [str(horovodrun), "-np", str(ranks), *where, sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        timer = threading.Timer(timeout, stop, [process]) if timeout else None
        if timer:
            timer.start()
        try:
            show(process.stderr, file)
            code = process.wait()
        finally:
            if timer:
                timer.cancel()
            stop(process)
    if code or finished(run, ranks, out) is None:
        late = timeout is not None and time.monotonic() - begin >= timeout
        why = f"took longer than {timeout:g} s" if late else f"ended with exit status {code}"
        sys.exit(
            f"accordion_paper: {run.name} {why}; its output is above and in {log}. The same command goes on from here"
        )


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """No other process writes to `out` until the end. SystemExit if one does."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"accordion_paper: another one is running and writes to {out}")
        yield

"""Starts trainings under horovodrun, one after the other, each in its own session whose processes are ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launching

from accordion_paper.experiments import Run


def finished(run: Run, ranks: int, out: Path) -> dict[str, Any] | None:
    """Returns the result of an earlier complete training with the same settings, or None."""
    try:
        result = json.loads((out / f"{run.stem}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result if result["settings"] == run.settings(ranks) else None


def start(
    run: Run, ranks: int, out: Path, command: Sequence[str], hosts: str | None = None, timeout: float | None = None
) -> None:
    """Trains under horovodrun, with a log in `out`. Raises SystemExit with the reason if it fails or takes too long."""
    log = out / f"{run.stem}.log"
    where = ["-H", hosts] if hosts else []
    why = launching.run([*launching.horovodrun(ranks, *where), sys.executable, *command], log, timeout)
    if why or finished(run, ranks, out) is None:
        sys.exit(
            f"accordion_paper: {run.name} {why or 'left no result'}; its output is above and in {log}. The same command goes "
            "on from here"
        )

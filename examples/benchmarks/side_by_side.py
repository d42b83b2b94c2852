"""Compares training modes in one run. They run in turns, so that noise affects all alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

RANKS = 2


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=15, help="turns of each mode")
    made.add_argument("--json", type=Path, help="write the rows to this file too")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def launch(script: str, *arguments: str) -> int:
    """Starts the script again under horovodrun, with one thread per rank and the same cycle time for all."""
    same = {"HOROVOD_CYCLE_TIME": "1", "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}
    env = {**same, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", **os.environ}
    horovodrun = Path(sys.executable).parent / "horovodrun"
    command = [str(horovodrun), "-np", str(RANKS), sys.executable, script, "--worker", *(arguments or sys.argv[1:])]
    return subprocess.run(command, env=env, check=False).returncode


def take_turns(modes: Sequence[str], turn: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds per step of each mode in each round. Every round begins with another mode."""
    for name in modes:
        turn(name)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in modes}
    for i in range(rounds):
        for name in order(modes, i):
            times[name].append(turn(name))
    return times


def order(modes: Sequence[str], i: int) -> list[str]:
    """Returns the order of the turns in round i. Every round begins with another mode."""
    first = i % len(modes)
    return [*modes[first:], *modes[:first]]


def report(title: str, times: dict[str, list[float]], file: Path | None) -> None:
    """Returns each mode's median step time, and the median of its ratios to the first mode's turn of the same round."""
    first = next(iter(times))
    rows = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[first], strict=True)]
        rows.append({"mode": name, "step_seconds": statistics.median(mine), "ratio": statistics.median(ratios)})
    lines = [f"{title}, {RANKS} ranks, one thread each, unshaped link"]
    lines += [f"{r['mode']:<18} {1e3 * r['step_seconds']:8.1f} ms a step   {r['ratio']:.3f} of {first}" for r in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=2) + "\n")

"""Changes of an elastic job, carried out by its workers between two steps; no framework.

A change is a text: "add 2", "remove 0" or "kill 1 2", where the numbers of the last two are ranks. Each waits until the one
before has come into force and so many steps were done since.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHASE = 12  # steps between a change's coming into force and the next


def sizes(start: int, changes: Sequence[str]) -> list[int]:
    """Numbers of workers: at the start, and after each change."""
    found = [start]
    for change in changes:
        kind, *numbers = change.split()
        found.append(found[-1] + (int(numbers[0]) if kind == "add" else -len(numbers)))
    return found


class Changes:
    """What a worker does of the changes that `job.run` was given.

    Args:
        phase: steps between two changes; the same on all ranks.
    """

    def __init__(self, phase: int = PHASE) -> None:
        plan = json.loads(os.environ["ELASTIC_PLAN"])
        self.changes, self.folder, self.phase = plan["changes"], Path(plan["folder"]), phase
        self.sizes = sizes(plan["start"], self.changes)
        self.host = os.environ["HOROVOD_HOSTNAME"]
        self.enter()
        faulthandler.register(signal.SIGUSR1)  # `job.run` asks where a worker hangs

    def enter(self) -> None:
        """At the beginning of the elastic function: all ranks are at the same point."""
        self.steps, self.entered = 0, time.monotonic()

    def step(self, rank: int, size: int) -> bool:
        """After each step, on every rank. Carries out this rank's part of a change that is due; True: all are done."""
        self.steps += 1
        if self.steps < self.phase:
            return False
        if self.steps == 3000:
            raise AssertionError(f"no change came into force for {self.steps} steps at size {size}")
        time.sleep(0.01)  # workers that start need the cores
        i = next((i for i in range(len(self.changes)) if not self._carried_out(i)), None)
        if i is None:
            return size == self.sizes[-1]
        mine = self.folder / f"{i}.{rank}"
        if size == self.sizes[i] and rank in self._actors(i) and not mine.exists():
            mine.touch()
            self._carry_out(i)
        return False

    def record(self, **event: Any) -> None:
        """A line for the test to read."""
        with open(self.folder / "events", "a") as file:
            file.write(json.dumps({"time": time.time(), "host": self.host, **event}) + "\n")

    def _actors(self, i: int) -> list[int]:
        kind, *numbers = self.changes[i].split()
        return [0] if kind == "add" else [*map(int, numbers)]

    def _carried_out(self, i: int) -> bool:
        return all((self.folder / f"{i}.{rank}").exists() for rank in self._actors(i))

    def _carry_out(self, i: int) -> None:
        kind, number = self.changes[i].split()[:2]
        if kind == "kill":
            while not self._carried_out(i):  # all that die in this change are at the same step
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(max(0.0, self.entered + 1.1 - time.monotonic()))  # Horovod numbers its notices by whole seconds
        with self._hosts() as hosts:
            if kind == "remove":
                hosts.remove(self.host)
            else:
                hosts += names(self.folder, int(number))

    @contextmanager
    def _hosts(self) -> Iterator[list[str]]:
        """The hosts that the launcher finds, to be edited."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / "hosts"
            hosts = file.read_text().split()
            yield hosts
            (self.folder / "new").write_text("\n".join(hosts))
            (self.folder / "new").replace(file)


def names(folder: Path, count: int) -> list[str]:
    """Names of hosts that were none yet: ways to write 127.0.0.1. A host that lost a worker is never asked again."""
    used = folder / "used"
    begin = int(used.read_text()) if used.exists() else 0
    used.write_text(str(begin + count))
    return [f"127.{'0' * (i // 3 + 1)}.{'0' * (i % 3 + 1)}.1" for i in range(begin, begin + count)]

"""Runs a process on each host for each mode. Only the processes of one mode run at a time; the others are stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hosts import Network, environment, mpirun, write_agent
from modes import Mode

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 300  # seconds for a turn, or for a mode to start
PORT = 29500


class Turn(NamedTuple):
    steps: int
    seconds: float  # per step, of the slowest rank
    sent: float  # bytes that left a host per step, mean over the hosts


class Failure(Exception):
    """The processes of a mode could not start or have ended. The message is one line."""


@dataclass
class Crew:
    """The processes of one mode."""

    launched: list[subprocess.Popen[bytes]]
    pids: list[int]
    connections: list[Connection]

    def signal(self, signum: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


class Fleet:
    def __init__(self, network: Network, model: str, cycle_time: float, folder: Path, logs: Path) -> None:
        self.network, self.model, self.logs = network, model, logs
        self.env = environment(cycle_time)
        self.agent = write_agent(network, folder)
        self.crews: dict[str, Crew] = {}
        self.path = str(folder / "controller")
        self.port = PORT
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        self.listener.settimeout(0.5)  # interval of the checks that the process still runs

    def start(self, mode: Mode) -> None:
        """Starts the processes of a mode and stops them before their first step."""
        hosts = len(self.network.addresses)
        command = [sys.executable, str(WORKER), self.path, self.model, mode.name]
        env = {**self.env, **({"PYTHONPATH": mode.checkout} if mode.checkout else {})}
        self.port += 1  # one per mode, because their stores exist at the same time
        with open(self.log(mode), "wb") as log:
            if mode.horovod:
                command = [*mpirun(self.network, self.agent), *command]
                launched = [self.network.start(0, command, env, log)]
            else:
                common = {"MASTER_ADDR": self.network.addresses[0], "MASTER_PORT": str(self.port)}
                common |= {"WORLD_SIZE": str(hosts), **env}
                launched = [self.network.start(i, command, {**common, "RANK": str(i)}, log) for i in range(hosts)]
        crew = self.crews[mode.name] = Crew(launched, [], [])
        waited = 0.0
        while len(crew.connections) < hosts:
            try:
                crew.connections.append(Connection(self.listener.accept()[0].detach()))
            except TimeoutError:
                waited += 0.5
                if waited > PATIENCE or any(process.poll() is not None for process in launched):
                    self.fail(mode)
        for connection in crew.connections:
            crew.pids.append(self.answer(mode, connection))
        crew.signal(signal.SIGSTOP)

    def turn(self, mode: Mode, steps: int) -> Turn:
        crew = self.crews[mode.name]
        crew.signal(signal.SIGCONT)
        for connection in crew.connections:
            with contextlib.suppress(OSError):  # a process that has ended is detected when its answer is read
                connection.send(steps)
        answers = [self.answer(mode, connection) for connection in crew.connections]
        crew.signal(signal.SIGSTOP)
        return Turn(steps, max(seconds for seconds, _ in answers), sum(sent for _, sent in answers) / len(answers))

    def end(self, mode: Mode) -> None:
        """Ends the processes of a mode. Remaining processes end with the hosts."""
        crew = self.crews.pop(mode.name)
        crew.signal(signal.SIGCONT)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            for connection in crew.connections:
                connection.send(0)
            for process in crew.launched:
                process.wait(10)

    def log(self, mode: Mode) -> Path:
        stem = re.sub(r"\W+", "-", f"{self.model} {len(self.network.addresses)} {mode.name}").strip("-")
        return self.logs / f"{stem}.log"

    def answer(self, mode: Mode, connection: Connection) -> Any:
        with contextlib.suppress(EOFError, OSError):
            if connection.poll(PATIENCE):
                answer = connection.recv()
                if not isinstance(answer, str):
                    return answer
                self.fail(mode, answer)
        self.fail(mode)

    def fail(self, mode: Mode, why: str = "ended or does not answer") -> NoReturn:
        crew = self.crews.pop(mode.name)
        for process in crew.launched:
            process.kill()
        crew.signal(signal.SIGKILL)
        raise Failure(f"{why} (see {self.log(mode).name})")


@contextlib.contextmanager
def fleet(network: Network, model: str, cycle_time: float, logs: Path) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        made = Fleet(network, model, cycle_time, Path(folder), logs)
        with made.listener:
            yield made

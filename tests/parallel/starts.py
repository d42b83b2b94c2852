"""Starts of ranks that several worker files share; each file's result is told apart, by rank and test.

A start runs the files of one framework, number of ranks and transport, one after the other, in one pytest on each rank.
Workers report each test to a file per rank (workers/conftest.py). A test that fails ends its start; the files behind it get
a new one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parallel.launcher import PYTEST, WORKERS, begin, end, environment_of, launch_command

LIMITS = {"torch": 120, "tensorflow": 400, "ranks": 10}  # seconds of one test
# Milliseconds between Horovod's rounds of talk, in which most tests only wait. Over Gloo, which waits by asking again and
# again, shorter ones take the ranks' time.
CYCLE_TIMES = {"mpi": "0.2", "gloo": "1"}


@dataclass(frozen=True)
class Case:
    """A worker file on so many ranks.

    Args:
        file: below workers/, without `.py`.
        only: names of its tests, as pytest's -k; empty: all.
        after: worker files, of two ranks over MPI, whose results it reads.
        cycle_time: milliseconds between Horovod's rounds of talk; empty: `CYCLE_TIMES`.
    """

    file: str
    ranks: int = 2
    transport: str = "mpi"
    only: str = ""
    after: tuple[str, ...] = ()
    cycle_time: str = ""

    @property
    def framework(self) -> str:
        return self.file.split("/")[0]

    @property
    def start(self) -> tuple[str, int, str, str]:
        """Cases for which this is equal run in one start."""
        return self.framework, self.ranks, self.transport, self.cycle_time

    @property
    def path(self) -> str:
        return f"{self.file}.py"

    @property
    def selection(self) -> str:
        """As pytest's -k."""
        name = self.path.split("/")[1]
        return f"({name} and ({self.only}))" if self.only else name

    def __str__(self) -> str:
        return f"{self.file}-{self.ranks}-{self.transport}"


@dataclass
class RankReport:
    """What one rank has reported so far."""

    collected: dict[str, int] = field(default_factory=dict)  # of each file
    ended: dict[str, int] = field(default_factory=dict)
    running: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)


def read_report(file: Path) -> RankReport:
    """The lines that workers/conftest.py writes; the last may be incomplete."""
    report = RankReport()
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if event["event"] == "collected":
            report.collected = event["tests"]
        elif event["event"] == "begins":
            report.running = event["test"]
        elif event["event"] == "ends":
            report.running = ""
            path = event["test"].split("::")[0]
            report.ended[path] = report.ended.get(path, 0) + 1
        else:
            report.failures.append(event)
    return report


@dataclass
class Start:
    """Ranks that run the files of some cases."""

    cases: Sequence[Case]
    process: subprocess.Popen[str]
    mark: str
    output: Path

    def reports(self) -> list[RankReport]:
        return [read_report(self.output.parent / f"{rank}.jsonl") for rank in range(self.cases[0].ranks)]

    def passed(self, case: Case) -> bool:
        """Whether every rank has run all tests of the file and none failed."""
        return all(
            0 < report.collected.get(case.path, 0) == report.ended.get(case.path, 0)
            and not any(failure["test"].startswith(case.path) for failure in report.failures)
            for report in self.reports()
        )

    def failed(self) -> Case | None:
        """The case of the first failure; else of what a rank ran, or was to run next, when all ended."""
        if self.process.returncode == 0 and all(map(self.passed, self.cases)):
            return None
        reports = self.reports()
        failures = sorted((f for report in reports for f in report.failures), key=lambda failure: failure["time"])
        places = [failure["test"] for failure in failures] + [report.running for report in reports if report.running]
        of_file = {case.path: case for case in self.cases}
        left = [case for case in self.cases if not self.passed(case)]
        return of_file[places[0].split("::")[0]] if places else (left or self.cases)[0 if left else -1]

    def account(self) -> str:
        """What failed, rank by rank, the first failure in full, and the end of what all ranks wrote."""
        failures = [(f["time"], rank, f) for rank, report in enumerate(self.reports()) for f in report.failures]
        lines = []
        for i, (_, rank, failure) in enumerate(sorted(failures, key=lambda failure: failure[:2])):
            lines.append(f"rank {rank}: {failure['test']} failed in {failure['when']}")
            lines.append(failure["error"] if i == 0 else failure["error"].rstrip().rsplit("\n", 1)[-1])
        for rank, report in enumerate(self.reports()):
            if report.running:
                lines.append(f"rank {rank}: {report.running} did not end")
        written = self.output.read_text(errors="replace")
        return "\n".join([*lines, f"exit status {self.process.poll()}, output:", written[-20_000:]])


class Starts:
    """Runs cases, as many in one start as can share it.

    Args:
        cases: all that this session will ask for, in the order in which it will.
        folder: where workers of one start leave what those of another read.
    """

    def __init__(self, cases: Iterable[Case], folder: Path, environment: Mapping[str, str]) -> None:
        self.cases = list(dict.fromkeys(cases))
        self.folder, self.environment = folder, environment
        self.done: dict[Case, str] = {}  # what failed; empty: nothing
        self.current: Start | None = None

    def check(self, case: Case) -> None:
        """AssertionError with each rank's failure if a test of the case failed."""
        while case not in self.done:
            if self.current is None or case not in self.current.cases:
                self.finish()
                self.current = self._start(case)
            self._await(case)
        assert not self.done[case], f"{case}:\n{self.done[case]}"

    def finish(self) -> None:
        """No process of the current start is left."""
        if self.current is not None:
            end(self.current.mark)
            self.current.process.wait()
            self.current = None

    def _start(self, case: Case) -> Start:
        cases = [c for c in self.cases if c.start == case.start and c not in self.done]
        for needed in dict.fromkeys(Case(file) for c in [*cases, case] for file in c.after):
            self.check(needed)
        self.finish()
        cases += [case] * (case not in cases)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        command = list(PYTEST)
        command += ["-o", f"timeout={LIMITS[case.framework]}", "-o", "timeout_method=thread"]
        command += ["-k", " or ".join(c.selection for c in cases), *(str(WORKERS / c.path) for c in cases)]
        environment = {**environment_of(case.ranks), **self.environment, "RANK_REPORTS": str(folder)}
        environment["HOROVOD_CYCLE_TIME"] = case.cycle_time or CYCLE_TIMES[case.transport]
        output = folder / "output"
        with output.open("w") as file:
            process, mark = begin(launch_command(command, case.ranks, case.transport), file, **environment)
        return Start(cases, process, mark, output)

    def _await(self, case: Case) -> None:
        """Until every rank has run the file, or the start has ended; that of the last file must."""
        assert self.current is not None
        start = self.current
        while start.process.poll() is None:
            if case is not start.cases[-1] and start.passed(case):
                self.done[case] = ""
                return
            time.sleep(0.05)
        end(start.mark)
        self.current = None
        failed = start.failed()
        self.done |= {c: "" for c in start.cases if c is not failed and start.passed(c)}
        if failed is not None:
            self.done[failed] = start.account()

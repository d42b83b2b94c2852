"""What all ranks share: process sets that tests ask for, temporary folders, reports to the pytest that started the ranks."""

import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure(config):
    """In a common folder pytest's clean-up now and then fails over another rank's."""
    folder = tempfile.TemporaryDirectory(prefix="rank-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder.name
    config.add_cleanup(folder.cleanup)
    if "RANK_REPORTS" in os.environ:
        config.pluginmanager.register(Reports())


class Reports:
    """Appends each event to this rank's file; tests/parallel/starts.py reads it."""

    def __init__(self):
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["HOROVOD_RANK"]
        self.file = Path(os.environ["RANK_REPORTS"]) / f"{rank}.jsonl"

    def write(self, event, **values):
        with self.file.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def fail(self, report, when):
        self.write("fails", test=name(report.nodeid), when=when, error=report.longreprtext, time=time.time())

    def pytest_collectreport(self, report):
        if report.failed:
            self.fail(report, "collection")

    def pytest_collection_finish(self, session):
        self.write("collected", tests=Counter(item.path.relative_to(HERE).as_posix() for item in session.items))

    def pytest_runtest_logstart(self, nodeid):
        self.write("begins", test=name(nodeid))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.fail(report, report.when)

    def pytest_runtest_logfinish(self, nodeid):
        self.write("ends", test=name(nodeid))


def name(nodeid):
    """torch/specs.py::test_x, from wherever pytest counts."""
    return nodeid.split("/workers/")[-1]


@pytest.fixture
def first(process_sets):
    """A process set of rank 0 alone."""
    return process_sets["first"]


@pytest.fixture
def others(process_sets):
    """A process set of all ranks but 0, where they are several; else of all."""
    return process_sets["others"]

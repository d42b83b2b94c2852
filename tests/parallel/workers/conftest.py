"""What all ranks share: the process sets that tests ask for, and a folder of their own for temporary files."""

import os
import tempfile

import pytest


def pytest_configure(config):
    """In a common folder pytest's clean-up now and then fails over another rank's."""
    folder = tempfile.TemporaryDirectory(prefix="rank-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture
def first(process_sets):
    """A process set of rank 0 alone."""
    return process_sets["first"]


@pytest.fixture
def others(process_sets):
    """A process set of all ranks but 0, where they are several; else of all."""
    return process_sets["others"]

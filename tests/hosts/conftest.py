"""The fixture that brings several hosts up; where they can't be, a test that needs them is skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts.ssh_hosts import Hosts, require, ssh_hosts


@pytest.fixture(scope="session")
def possible() -> None:
    try:
        require()
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.fixture
def bring_up(possible: None, tmp_path: Path) -> Iterator[Callable[[int], Hosts]]:
    """A function that brings up so many hosts; they go with the test."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(ssh_hosts(count, tmp_path))

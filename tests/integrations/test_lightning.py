"""Lightning on real ranks: each case is a pytest file of workers/, run on every rank."""

import sys
from pathlib import Path

import pytest
from launcher import horovodrun

pytestmark = pytest.mark.integrations

WORKERS = Path(__file__).parent / "workers"


def worker(name: str, transport: str = "mpi", **env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    horovodrun([*command, str(WORKERS / f"{name}.py")], 2, transport, timeout=150, **env)


def test_training():
    worker("lightning_training", transport="gloo")

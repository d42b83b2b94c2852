"""Hugging Face's Trainer on two ranks; the cases are in workers/transformers_*.py."""

import sys
from pathlib import Path

import pytest
from launcher import horovodrun

pytest.importorskip("transformers")
pytestmark = [pytest.mark.parallel, pytest.mark.integrations]

WORKERS = Path(__file__).parent / "workers"
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]


def test_trainer():
    horovodrun([*PYTEST, str(WORKERS / "transformers_trainer.py")], 2, "mpi", timeout=400)


def test_checkpoints():
    horovodrun([*PYTEST, str(WORKERS / "transformers_checkpoint.py")], 2, "gloo", timeout=400)

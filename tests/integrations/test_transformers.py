"""Hugging Face's Trainer on two ranks; the cases are in workers/transformers_*.py."""

import json
import sys
from pathlib import Path

import pytest

from tests.parallel.launcher import PYTEST, started

pytest.importorskip("transformers")
pytestmark = [pytest.mark.parallel, pytest.mark.integrations]

WORKERS = Path(__file__).parent / "workers"


def test_trainer():
    started([*PYTEST, str(WORKERS / "transformers_trainer.py")], 2, "mpi", timeout=400)


def test_checkpoints():
    started([*PYTEST, str(WORKERS / "transformers_checkpoint.py")], 2, "gloo", timeout=400)


def test_example():
    script = Path(__file__).parents[2] / "examples" / "transformers" / "transformers_gpt.py"
    sizes = ["--examples", "128", "--epochs", "1", "--width", "32", "--layers", "1", "--accumulate", "2"]
    output = started([sys.executable, str(script), *sizes], 2, "gloo", timeout=240)
    found = json.loads(output[output.rindex("{") : output.rindex("}") + 1])
    assert found["ranks"] == 2 and found["updates"] == 4
    assert 1 < found["eval_loss"] < 5.6 and found["sent_bytes"] < found["dense_bytes"]

"""The examples that Ray and Spark start, where these are installed: docs/launching.md says how."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.parallel.launcher import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.parallel, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            "ray/pytorch_ray_mnist.py",
            marks=pytest.mark.skipif(not find_spec("ray"), reason="Ray not found: pip install ray"),
        ),
        pytest.param(
            "spark/keras_spark_mnist.py",
            marks=pytest.mark.skipif(
                not (find_spec("pyspark") and shutil.which("java")),
                reason="Spark not found: apt-get install default-jre-headless; pip install pyspark",
            ),
        ),
    ],
)
def test_ranks_of_ray_and_spark_train_together(example, tmp_path):
    command = [sys.executable, str(EXAMPLES / example), "--epochs", "2"]
    paths = {"PYTHONPATH": str(EXAMPLES.parent), "PYSPARK_PYTHON": sys.executable, "HOME": str(tmp_path)}
    output = run(command, 300, **paths)
    result = json.loads(output[output.rindex('{"accuracy"') :].splitlines()[0])
    first, second = result["checksums"]
    assert first == second
    assert result["accuracy"] > 0.8 and result["dense_bytes"] > 20 * result["sent_bytes"]

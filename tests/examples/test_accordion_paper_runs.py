"""The paper's experiments on two ranks, at the tiny scale."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.launcher import horovodrun

WORKER = Path(__file__).parent / "workers" / "accordion_paper_resume.py"
pytestmark = pytest.mark.parallel


def test_one_command(paper, tmp_path, monkeypatch, capsys):
    """Trains, writes everything, and trains nothing twice."""
    out = tmp_path / "out"
    words = ["--scale", "tiny", "--only", "*lstm*/accordion/*", "--out", str(out)]
    command = [sys.executable, str(Path(paper.__file__)), *words]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, stdout=subprocess.DEVNULL)
    result = json.loads((out / "topics-lstm-topk-accordion-1.json").read_text())
    assert result["settings"]["ranks"] == 2 and len(result["history"]) == len(result["regimes"]) == 2
    assert 1 < result["value"] < result["history"][0]["value"] < 500  # words
    assert result["sent_bytes"] > 0 and result["seconds"] > 0
    shapes = [(500, 32), *2 * [(128, 32), (128, 32), (128,), (128,)], (500,)]
    steps = 2 * -(
        -(6000 // 32 - 1) // 30
    )  # up to the first comparison, which ends the second epoch here, all is critical
    dense = [floats for shape in shapes if len(shape) == 1 for floats in shape]
    sparse = [2 * 2 * math.ceil(0.99 * math.prod(shape)) for shape in shapes if len(shape) == 2]
    assert result["floats"] == steps * (sum(dense) + sum(sparse))
    assert {path.name for path in out.iterdir()} >= {"table.md", "results.json", "curves.png"}

    monkeypatch.setattr(paper.launch, "start", lambda *_: pytest.fail("trained again"))
    paper.main(paper.parser.parse_args(words))
    assert "| **Accordion** |" in capsys.readouterr().out
    (run,) = paper.experiments.runs("tiny", only="*lstm*/accordion/1", epochs=3)
    assert paper.launch.finished(run, 2, out) is None


def test_a_failure_says_which_and_why(paper, tmp_path):
    (run,) = paper.experiments.runs("tiny", only="*lstm*/relaxed/1")
    with pytest.raises(SystemExit, match=r"topics-lstm-topk/relaxed/1 ended with exit status [1-9]"):
        paper.launch.start(run, 1, tmp_path, ["-c", "raise SystemExit('no such luck')"])
    assert "no such luck" in (tmp_path / f"{run.stem}.log").read_text()


def test_cut_off_trainings_go_on(paper, tmp_path):
    output = horovodrun([sys.executable, str(WORKER), str(Path(paper.__file__).parent), str(tmp_path)], 2, timeout=300)
    assert output.count("same: ") == 2 * 4, output  # ranks, experiments

"""What the paper's experiments are made of, against the paper's own numbers; and what is made of their results."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from hvd_accordion import Accordion, Dense, PowerSGD, TopK


@pytest.fixture(autouse=True)
def _program(paper):
    """On the path."""


def test_rates_are_the_papers():
    from accordion_paper.experiments import CNN, LSTM

    assert [CNN.rate(epoch, 4) for epoch in (0, 1, 5, 149)] == pytest.approx([0.1, 0.16, 0.4, 0.4])
    assert [CNN.rate(epoch, 4) for epoch in (150, 249, 250, 299)] == pytest.approx([0.04, 0.04, 0.004, 0.004])
    assert [CNN.rate(epoch, 8) for epoch in range(6)] == pytest.approx([0.1, 0.24, 0.38, 0.52, 0.66, 0.8])
    assert LSTM.rate(70, 4) == pytest.approx(1.0)
    assert replace(CNN, warmup=0).rate(0, 4) == pytest.approx(0.4)


def test_shorter_schedules_keep_their_shares():
    from accordion_paper.experiments import CNN, LSTM

    tenth, fifth = CNN.shortened(30), LSTM.shortened(18)
    assert (tenth.epochs, tenth.milestones, tenth.warmup, tenth.interval) == (30, (15, 25), 1, 1)
    assert (fifth.epochs, fifth.milestones, fifth.warmup, fifth.interval) == (18, (12, 16), 1, 1)
    assert CNN.shortened(600).milestones == (300, 500)
    with pytest.raises(ValueError, match="epochs must be an integer >= 1, got 0"):
        CNN.shortened(0)


def test_levels():
    from accordion_paper.experiments import FULL, Run

    rows = {row.name: row for row in FULL}
    vgg, lstm, batch = (
        rows[f"{n}"] for n in ("cifar10-vgg19bn-powersgd", "wikitext2-lstm-topk", "cifar10-resnet18-batch")
    )
    assert vgg.compression("relaxed") == PowerSGD(1)
    assert vgg.compression("accordion") == Accordion(PowerSGD(4), PowerSGD(1), eta=0.5, interval=10)
    assert lstm.compression("accordion") == Accordion(TopK(0.99), TopK(0.02), eta=0.5, interval=5)
    assert lstm.compression("dense") == batch.compression("accordion") == Dense()
    assert [Run(batch, mode, 1).batch for mode in ("relaxed", "critical", "accordion")] == [1024, 128, 128]
    assert [Run(batch, mode, 1).scale(4) for mode in ("relaxed", "critical", "accordion")] == [8, 1, 1]
    assert Run(vgg, "relaxed", 1).scale(4) == 4


def test_floats_are_those_of_the_authors_logs():
    """Over 300 epochs of 98 steps, as they print them: millions, one decimal (two digits less for the batches)."""
    from accordion_paper.experiments import FULL
    from accordion_paper.floats import floats_a_step
    from accordion_paper.models import MODELS

    known = [(row, mode) for row in FULL for mode in row.floats if mode != "accordion"]
    assert len(known) == 8
    for row, mode in known:
        shapes = [tuple(p.shape) for p in MODELS[row.model](int(row.data[5:])).parameters()]
        floats = 300 * 98 * floats_a_step([(row.level(mode), shape) for shape in shapes], 4) / 1e6
        share = 1 / row.factor if mode == "relaxed" else 1  # of the updates
        tolerance = 0.06 if row.family == "powersgd" else 0.003 * row.floats[mode]
        assert floats * share == pytest.approx(row.floats[mode], abs=tolerance)


def test_floats_of_sparse_and_dense():
    from accordion_paper.floats import floats

    assert floats(TopK(0.1), (20, 5), ranks=4) == 2 * 10 * 4
    assert floats(TopK(0.1), (20,), ranks=4) == floats(PowerSGD(2), (20,), ranks=4) == 20
    assert floats(PowerSGD(8), (3, 5, 5), ranks=4) == 3 * (3 + 25)
    assert floats(Dense(), (20, 5), ranks=4) == 100


def test_names_and_globs():
    from accordion_paper.experiments import runs

    every = runs("smoke")
    assert len(every) == len({run.stem for run in every}) == 36
    assert [run.name for run in runs("tiny", only="*batch/r*")] == ["digits-resnet18-batch/relaxed/1"]
    assert {run.mode for run in runs("smoke", only="*powersgd/*/1", dense=True)} == {
        "relaxed",
        "critical",
        "accordion",
        "dense",
    }
    assert runs("full", (7,), epochs=30)[0].experiment.recipe.milestones == (15, 25)
    with pytest.raises(ValueError, match="scale must be one of 'full', 'smoke', 'tiny', got 'huge'"):
        runs("huge")


def test_settings_tell_trainings_apart():
    from accordion_paper.experiments import runs

    (run,) = runs("tiny", only="*powersgd/accordion/1")
    settings = run.settings(2)
    assert json.loads(json.dumps(settings)) == settings
    others = [replace(run, seed=2).settings(2), run.settings(3), runs("tiny", (1,), run.name, epochs=3)[0].settings(2)]
    assert all(other != settings for other in others)


def results(values, sent):
    """Of the smoke scale's first and second row, three seeds each: made-up values and bytes by mode."""
    from accordion_paper.experiments import SMOKE, Run

    found = {}
    for row in SMOKE[:2]:
        for mode in ("critical", "accordion"):
            for seed, value in enumerate(values[row.metric][mode], 1):
                history = [{"value": value, "sent_bytes": sent[mode] / 2}, {"value": value, "sent_bytes": sent[mode]}]
                numbers = {"floats": 1e6, "dense_bytes": 4e6, "seconds": 2.0, "critical_fraction": 0.25}
                found[Run(row, mode, seed)] = {"value": value, "sent_bytes": sent[mode], "history": history, **numbers}
    return found


VALUES = {
    "accuracy": {"critical": (97.0, 97.0, 97.0), "accordion": (96.6, 96.8, 97.0)},  # spread 0.2, behind 0.2
    "perplexity": {"critical": (50.0, 50.0, 50.0), "accordion": (50.0, 51.0, 52.0)},  # spread 1, behind 1
}


@pytest.mark.parametrize(("shift", "holds"), [(-0.01, True), (0.01, False)])
def test_verdict(shift, holds):
    from accordion_paper import table
    from accordion_paper.experiments import SMOKE

    sign = {"accuracy": -1, "perplexity": 1}
    values = {
        metric: {"critical": of["critical"], "accordion": [x + sign[metric] * shift for x in of["accordion"]]}
        for metric, of in VALUES.items()
    }
    cells = table.cells(results(values, {"critical": 3e6, "accordion": 2e6}))
    for row in SMOKE[:2]:
        seen = table.verdict(row, cells[row.name, "accordion"], cells[row.name, "critical"])
        assert (seen.less, seen.sends_less, seen.holds) == (1.5, True, holds)
        assert seen.behind == pytest.approx((1 if row.metric == "perplexity" else 0.2) + shift)
    one = cells[SMOKE[0].name, "accordion"]._replace(sent_bytes=2.1e6, spread=math.nan)
    seen = table.verdict(SMOKE[0], one, cells[SMOKE[0].name, "critical"])
    assert not seen.sends_less and not seen.holds


def test_report(paper, tmp_path):
    paper.report(results(VALUES, {"critical": 3e6, "accordion": 1e6}), tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1 and len({len(line) for line in lines[:6]}) == 1
    assert "96.80 ± 0.20 %" in lines[3] and "3.00" in lines[3] and "25%" in lines[3]
    assert "51.00 ± 1.00 ppl" in lines[5]
    assert len(lines) == 9 and "3.00 times less sent, at least 1.5 times" in lines[7]
    assert json.loads((tmp_path / "results.json").read_text())["topics-lstm-topk/critical/2"]["value"] == 50.0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_mlflow(paper, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow keeps artifacts there
    uri, found = f"sqlite:///{tmp_path / 'mlflow.db'}", results(VALUES, {"critical": 3e6, "accordion": 1e6})
    paper.report(found, tmp_path)
    paper.log(uri, found, tmp_path)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("accordion_paper").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["topics-lstm-topk/accordion/value"] == 51.0
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"table.md", "results.json", "curves.png"}


def test_reference_stands_beside():
    from accordion_paper import table
    from accordion_paper.experiments import FULL

    cell = table.Cell(1, 94.0, math.nan, 1350.5e6, 4e9, 1e4, 0.0)
    assert table.row(FULL[0], "relaxed", cell, None)[3:7] == ["94.00 %", "94.25", "1,350.5", "1,350.5"]


def test_list_and_errors(paper, capsys, tmp_path):
    def run(*words):
        paper.main(paper.parser.parse_args([*words, "--out", str(tmp_path)]))

    run("--list", "--scale", "full", "--only", "cifar10-senet-*/1")
    assert capsys.readouterr().out.split() == [
        f"cifar10-senet-{family}/{mode}/1"
        for family in ("powersgd", "topk")
        for mode in ("relaxed", "critical", "accordion")
    ]
    for words, error in (
        (["--only", "nothing*"], "--only 'nothing*' matches no training"),
        (["--scale", "full", "--only", "cifar100*"], "cifar100 needs --data PATH"),
        (["--scale", "full", "--data", str(tmp_path)], "holds no CIFAR-10: it must contain cifar-10-batches-py/"),
        (["--scale", "full", "--data", str(tmp_path), "--only", "wiki*"], "wiki.train.tokens and wiki.valid.tokens"),
        (["--epochs", "0"], "epochs must be an integer >= 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            run(*words)
        assert error in capsys.readouterr().err


def test_a_rank_is_told_all(paper, tmp_path):
    words = [
        "--scale",
        "full",
        "--data",
        ".",
        "--epochs",
        "30",
        "--only",
        "wikitext2*/accordion/2",
        "--out",
        str(tmp_path),
    ]
    args = paper.parser.parse_args(words)
    (run,) = paper.experiments.runs(args.scale, (2,), args.only, args.epochs)
    there = paper.parser.parse_args(paper.command(args, run, tmp_path)[1:])
    (same,) = paper.experiments.runs(there.scale, (2,), there.train, there.epochs)
    assert same.settings(4) == run.settings(4) and there.data.is_absolute() and there.out == tmp_path

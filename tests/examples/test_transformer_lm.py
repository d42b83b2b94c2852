"""The language model's comparison: text, options, table and picture from made-up results, and one short comparison."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

TINY = "--steps 4 --every 2 --batch 4 --context 8 --width 16 --layers 1 --heads 2 --warmup 2".split()


def trial(seed, link, losses, sent):
    """A training with a point each second, that sends `sent` bytes in all."""
    points = [[sent * i / len(losses), loss] for i, loss in enumerate(losses, 1)]
    return {
        "seed": seed,
        "link": link,
        "validation_loss": losses[-1],
        "sent_bytes": sent,
        "dense_bytes": 8e6,
        "steps": 2 * len(losses),
        "ranks": 2,
        "points": points,
        "clock": [float(i) for i in range(1, len(losses) + 1)],
    }


def made_up(links):
    return {
        "adamw": [trial(i, link, [3.0, 2.0, 1.6 - i / 100], 8e6) for i, link in enumerate(links)],
        "muon": [trial(i, link, [2.5, 1.5 - i / 100, 1.2], 8e6) for i, link in enumerate(links)],
    }


def test_ranks_share_the_same_windows_of_the_text(transformer_lm, tmp_path):
    from language_model import text

    file = tmp_path / "text"
    file.write_text("abcdefghij" * 30, encoding="utf-8")
    data = text.load(file, 8)
    assert (len(data.train), len(data.validation), data.vocabulary) == (270, 30, 10)
    one, both = (
        [next(text.batches(data.train, 8, 6, seed=3, rank=rank, size=size)) for rank in range(size)] for size in (1, 2)
    )
    assert one[0].shape == (6, 9) and {tuple(x) for x in one[0]} == {tuple(x) for part in both for x in part}
    assert (np.diff(one[0]) % 10 == 1).all()
    parts = [text.windows(data.validation, 8, rank, 2) for rank in range(2)]
    assert [part.shape for part in parts] == [(2, 9), (1, 9)]
    assert np.array_equal(np.concatenate([parts[0][0], parts[1][0], parts[0][1]]), data.validation[:27])
    with pytest.raises(ValueError, match="300 characters is too short for windows of 41"):
        text.load(file, 40)


def test_text_at_hand_is_pythons_help(transformer_lm):
    from language_model import text

    data = text.load(None, 64)
    assert len(data.train) > 300_000 and 50 < data.vocabulary < 200
    assert max(data.train.max(), data.validation.max()) == data.vocabulary - 1


def test_table(transformer_lm):
    from language_model import report
    from link_seconds import LOCAL, notes

    lines = report.table(made_up([LOCAL, "1 Gbit/s", "100 Mbit/s"])).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:5] == ["Muon: dense gradients", "1.200 (1.200 to 1.200)", "8.00", "1.0", "3.0"]
    assert cells[5:] == ["3.0", "2.0", "3.0", "2.0"]  # its second point is below AdamW's mean end, 1.59
    assert "~: " in notes(made_up([LOCAL]), "steps") and "~3." in report.table(made_up([LOCAL]))
    without = report.table({"muon": made_up([LOCAL])["muon"]})
    assert without.count("| - ") == 0 and " - |" in without  # nothing to reach


def test_picture(transformer_lm):
    from language_model import report
    from link_seconds import LOCAL

    figure = report.draw(made_up([LOCAL, "1 Gbit/s"]))
    sent, fast, slow = figure.axes
    assert [line.get_label() for line in sent.lines] == ["AdamW: dense gradients", "Muon: dense gradients"]
    assert [line.get_linestyle() for line in sent.lines] == ["--", "-"]
    assert sent.lines[0].get_xdata()[-1] == 8.0 and list(sent.lines[1].get_ydata()) == [2.5, 1.495, 1.2]
    assert fast.get_xlabel().endswith("1 Gbit/s, measured") and slow.get_xlabel().endswith("100 Mbit/s, predicted")
    figure.canvas.draw()


def test_trainings_get_the_options_of_the_comparison(transformer_lm):
    from language_model import compare

    args = transformer_lm.parser.parse_args(["--compare", "muon", "--steps", "7", "--no-progress", "--local"])
    words = [word for option in compare.passed_on(args) for word in option]
    again = transformer_lm.parser.parse_args(words)
    assert (again.steps, again.no_progress, again.local, again.compare, again.text) == (7, True, False, None, None)
    assert "--seed" not in words and "--text" not in words


def test_muon_gets_the_blocks_matrices_alone(transformer_lm):
    model = transformer_lm.GPT(vocabulary=10, context=8, width=16, layers=1, heads=2)
    matrices, others = transformer_lm.split(model)
    assert {name.split(".")[2] for name in matrices} == {"qkv", "out", "up", "down"}
    assert "tokens.weight" in others and "head.weight" in others and "blocks.0.norm2.weight" in others
    assert {**matrices, **others}.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parallel
def test_comparison(transformer_lm, tmp_path, monkeypatch, capfd):
    """The whole program with two methods, one seed and four steps, on two ranks; the second time nothing is trained."""
    from language_model import compare

    monkeypatch.setattr(compare, "MLFLOW_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = tmp_path / "out"
    methods = ["adamw-powersgd4", "muon"]
    words = [*TINY, "--compare", *methods, "--seeds", "5", "--local", "--out", str(out), "--timeout", "200"]
    args = transformer_lm.parser.parse_args(words)
    script = compare.ROOT / "examples" / "pytorch" / "transformer_lm.py"
    compare.run(script, args)
    assert "| AdamW: PowerSGD(rank=4) " in capfd.readouterr().out
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and "4 steps, 2 ranks" in (out / "table.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert [*results] == methods
    for (result,), less in zip(results.values(), (True, False), strict=True):
        assert (result["seed"], result["steps"], result["ranks"], len(result["points"])) == (5, 4, 2, 2)
        assert 2.0 < result["validation_loss"] < 5.0 and result["tokens_per_second"] > 0
        assert (result["sent_bytes"] < result["dense_bytes"]) is less
    monkeypatch.setattr(compare.launching, "run", lambda *_: sys.exit("trained again"))
    compare.run(script, args)

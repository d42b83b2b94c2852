"""The demo: its table, predictions and picture from made-up results, how it ends trainings, and one short training."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

RANKS, STEPS, EPOCHS = 2, 8, 2


def trial(seed, link, accuracy, sent, regimes=()):
    """A training of two epochs that sends `sent` bytes and takes a second an epoch."""
    return {
        "seed": seed,
        "link": link,
        "accuracy": accuracy,
        "sent_bytes": sent,
        "dense_bytes": 8e6,
        "critical_fraction": 0.5,
        "epochs": EPOCHS,
        "steps": STEPS,
        "ranks": RANKS,
        "points": [[sent / 2, 0.5], [sent, accuracy]],
        "clock": [1.0, 2.0],
        "regimes": list(regimes) or [{}, {}],
    }


def made_up(links):
    regimes = [{"conv1.weight": "critical", "model/dense/kernel": "relaxed"}] * EPOCHS
    return {
        "dense": [trial(i, link, 0.96 - i / 100, 8e6) for i, link in enumerate(links)],
        "accordion": [trial(i, link, 0.95 - i / 100, 4e5, regimes) for i, link in enumerate(links)],
    }


def test_seconds_over_a_link_are_measured_or_predicted(demo):
    from link_seconds import LATENCY, LOCAL, clock

    measured = made_up([LOCAL, "1 Gbit/s"])["dense"]
    assert clock(measured, LOCAL) == clock(measured, "1 Gbit/s") == ([1.0, 2.0], True)
    seconds, known = clock(measured, "100 Mbit/s")
    travel = 8e6 / (1e8 / 8) + STEPS * 2 * LATENCY
    assert seconds == pytest.approx([1.0 + travel / 2, 2.0 + travel]) and not known


def test_table(demo):
    from demo_report import table
    from link_seconds import LOCAL, notes

    results = made_up([LOCAL, "1 Gbit/s"])
    lines = table(results).splitlines()
    assert len({len(line) for line in lines}) == len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["accordion", "94.5% (94.0% to 95.0%)", "0.4", "20.0", "2.0", "2.0", "~2.0"]
    below = notes(results, "epochs")
    assert "seeds and where they trained: 0 (this machine), 1 (1 Gbit/s)" in below and "~: " in below
    assert "~: " not in notes(made_up([LOCAL, "1 Gbit/s", "100 Mbit/s"]), "epochs")


def test_picture(demo):
    from demo_report import draw
    from link_seconds import LOCAL

    figure = draw(made_up([LOCAL]))
    sent, regimes, fast, slow = figure.axes
    assert [line.get_label() for line in sent.lines] == ["dense", "accordion"]
    assert list(sent.lines[1].get_xdata()) == [0.2, 0.4]
    assert max(fast.lines[0].get_xdata()) < max(slow.lines[0].get_xdata())
    assert "predicted" in slow.get_xlabel()
    assert [label.get_text() for label in regimes.get_yticklabels()] == ["conv1", "dense"]
    figure.canvas.draw()


def test_failures_say_why_and_leave_no_process(demo, tmp_path):
    import launching

    log = tmp_path / "log"
    assert launching.run([sys.executable, "-c", "print('fine')"], log) is None
    assert launching.run([sys.executable, "-c", "raise SystemExit(3)"], log) == "ended with exit status 3"
    begin = time.monotonic()
    sleeper = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    assert launching.run([sys.executable, "-c", sleeper], log, timeout=1.0) == "took longer than 1 s"
    assert time.monotonic() - begin < 20
    first, pid = log.read_text().split()
    assert first == "fine"
    assert subprocess.run(["kill", "-0", pid], capture_output=True, check=False).returncode


def test_two_demos_never_write_to_one_folder(demo, tmp_path):
    import launching

    with launching.alone(tmp_path), pytest.raises(SystemExit, match="another one is running"):
        with launching.alone(tmp_path):
            pass


def test_keras_network_is_that_of_torch(demo):
    """Shapes of all weights, but for the order of their axes."""
    pytest.importorskip("tensorflow")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {}_mnist import vgg; print([{} for w in vgg().{}])"
    found = []
    for folder, shape, weights in (
        ("pytorch", "list(w.shape)", "parameters()"),
        ("keras", "list(w.shape)", "trainable_weights"),
    ):
        path = str(demo.ROOT / "examples" / folder)
        words = [sys.executable, "-c", code.format(folder, shape, weights), path]
        out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
        found.append([sorted(shape) for shape in json.loads(out)])
    assert found[0] == found[1]


@pytest.mark.parallel
def test_one_training(demo, tmp_path, monkeypatch, capfd):
    """The whole program with one compression, one seed and one epoch, on two ranks."""
    monkeypatch.setattr(demo, "MLFLOW_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(demo, "FOLDERS", {"torch": tmp_path / "out"})
    monkeypatch.setattr(demo, "RUNS", {name: demo.RUNS[name] for name in demo.RUNS if name.startswith("Accordion")})
    monkeypatch.setattr(demo, "RECIPE", ["128" if word == "1000" else word for word in demo.RECIPE])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs", "1", "--seeds", "5"])
    demo.main()
    assert "| Accordion(PowerSGD(4), PowerSGD(1)) |" in capfd.readouterr().out
    out = tmp_path / "out"
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG" and "seed" in (out / "table.md").read_text()
    ((result,),) = json.loads((out / "results.json").read_text()).values()
    assert (result["seed"], result["steps"], result["ranks"], result["link"]) == (5, 2, 2, "this machine")
    assert set(result["regimes"][0].values()) == {"critical"} and "conv2.weight" in result["regimes"][0]
    assert 0 < result["sent_bytes"] < result["dense_bytes"] / 10

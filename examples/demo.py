"""Trains one network with different compressions and seeds, and compares accuracy, bytes and seconds.

The first seed trains on this machine, the others over links of 1 Gbit/s and 100 Mbit/s. The links are network namespaces,
which need root and iproute2. Without them all seeds train on this machine, and the cost model predicts the links' seconds.
Writes table.md, results.json, demo.png and a log of each training to build/demo/ (torch) or build/demo-keras/, and
everything to MLflow (mlflow.db).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import launching
import shaped_links
from demo_report import draw, table
from link_seconds import mean, notes
from mlflow_runs import Experiment

ROOT = Path(__file__).resolve().parent.parent
MLFLOW_URI = f"sqlite:///{ROOT / 'mlflow.db'}"
SCRIPTS = {  # their names are those of MLflow's experiments, too
    "torch": ROOT / "examples" / "pytorch" / "pytorch_mnist.py",
    "keras": ROOT / "examples" / "keras" / "keras_mnist.py",
}
FOLDERS = {"torch": ROOT / "build" / "demo", "keras": ROOT / "build" / "demo-keras"}
RECIPE = "--model vgg --examples 1000 --weight-decay 1e-4 --drops 0.5 0.83".split()
RATES = {"torch": "0.05", "keras": "0.025"}  # of one rank; at 0.05 Keras ends lower, without compression too
RUNS = {
    "plain Horovod": "--compression none".split(),
    "PowerSGD(1) throughout": "--compression powersgd --level relaxed".split(),
    "PowerSGD(4) throughout": "--compression powersgd --level critical".split(),
    "Accordion(PowerSGD(4), PowerSGD(1))": "--compression accordion-powersgd --interval 2".split(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=SCRIPTS, default="torch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--np", type=int, default=2, help="ranks, at least 2")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one training may take")
    args = parser.parse_args()
    if args.np < 2:
        parser.error(f"--np must be at least 2, got {args.np}")

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("demo: interrupted"))
    begin = time.perf_counter()
    script, out = SCRIPTS[args.framework], FOLDERS[args.framework]
    with launching.alone(out):
        experiment = Experiment(MLFLOW_URI, script.stem, ROOT / "mlruns")
        results = trainings(script, args, out)
        text = f"{table(results)}\n\n{notes(results, 'epochs')}"
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        draw(results).savefig(out / "demo.png", dpi=120)
        log_demo(experiment, results, out)
    print(f"\n{text}\n{time.perf_counter() - begin:.0f} s in all")
    print(f"Written to {out} (table.md, results.json, demo.png) and {MLFLOW_URI}: make ui")


def trainings(script: Path, args: argparse.Namespace, out: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs with all seeds; seed by seed, so that the runs of one link come close to each other."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with shaped_links.ranks(args.np) as ranks:
        for i, seed in enumerate(args.seeds):
            link = ranks.links[i % len(ranks.links)]
            start, env = ranks.start(link)
            for j, name in enumerate(RUNS, 1):
                done = f"{i * len(RUNS) + j}/{len(args.seeds) * len(RUNS)}"
                print(f"[{done}] {name}, seed {seed}, {link}", flush=True)
                command = [*start, sys.executable, str(script), *RECIPE, *RUNS[name]]
                command += ["--lr", RATES[args.framework], "--epochs", str(args.epochs), "--seed", str(seed)]
                trial = train(f"{name}, seed {seed}", command, env, args.timeout, out)
                results[name].append({"seed": seed, "link": link, **trial})
    return results


def train(name: str, command: list[str], env: dict[str, str], timeout: float, out: Path) -> dict[str, Any]:
    """One training: the JSON line of its output, and its history by epoch."""
    stem = re.sub(r"\W+", "-", name.lower())
    history, log = out / f"{stem}.json", out / f"{stem}.log"
    log.unlink(missing_ok=True)
    command = [*command, "--history", str(history), "--mlflow-uri", MLFLOW_URI, "--run-name", name]
    why = launching.run(command, log, timeout, env, ROOT)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = [line for line in launching.TAG.sub("", text).splitlines() if line.startswith('{"accuracy"')]
    if why or not found:
        sys.exit(f"demo: the training {name!r} {why or 'printed no result'}; its output is above and in {log}")
    return {"command": command, **json.loads(found[-1]), **json.loads(history.read_text(encoding="utf-8"))}


def log_demo(experiment: Experiment, results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """One MLflow run with the means over the seeds, the table and the picture."""
    metrics = {}
    for name, trials in results.items():
        short = re.sub(r"\W+", " ", name).strip()  # MLflow allows no parentheses
        for key in ("accuracy", "sent_bytes", "dense_bytes", "critical_fraction"):
            metrics[f"{short}/{key}"] = mean(trials, key)
    experiment.log("demo", metrics, [out / file for file in ("table.md", "results.json", "demo.png")])


if __name__ == "__main__":
    main()

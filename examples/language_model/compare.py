"""Runs many methods with several seeds, one training after the other, and reports what they lose, send and take.

Seed by seed over another link: this machine, 1 Gbit/s, 100 Mbit/s. Each result is written as soon as it is there; the same
command goes on after the last one.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import launching
import shaped_links
from link_seconds import LOCAL, mean, notes
from mlflow_runs import Experiment

from language_model import report
from language_model.methods import DEMO, METHODS

ROOT = Path(__file__).resolve().parents[2]
MLFLOW_URI = f"sqlite:///{ROOT / 'mlflow.db'}"
# what a training gets from here, and not from the command line
OWN = ("compare", "seeds", "np", "local", "timeout", "out", "method", "seed", "mlflow_uri", "run_name", "history")

Trial = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What the comparison adds to a training's arguments."""
    more = parser.add_argument_group("comparison of methods")
    more.add_argument("--compare", nargs="*", choices=METHODS, metavar="METHOD", help=f"default: {' '.join(DEMO)}")
    more.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    more.add_argument("--np", type=int, default=2, help="ranks, at least 2")
    more.add_argument("--local", action="store_true", help="no shaped links: all seeds on this machine")
    more.add_argument("--timeout", type=float, default=900.0, help="seconds that one training may take")
    more.add_argument("--out", type=Path, default=ROOT / "build" / out, help="folder of the results")


def run(script: Path, args: argparse.Namespace) -> None:
    """Trains all methods with all seeds; writes table.md, results.json, loss.png, a result and a log of each training."""
    if args.np < 2:
        sys.exit(f"{script.stem}: --np must be at least 2, got {args.np}")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(f"{script.stem}: interrupted"))
    begin = time.perf_counter()
    with launching.alone(args.out):
        experiment = Experiment(MLFLOW_URI, script.stem, ROOT / "mlruns")
        results: dict[str, list[Trial]] = {}
        for name, trial in trials(script, args):
            results.setdefault(name, []).append(trial)
        text = f"{report.table(results)}\n\n{notes(results, 'steps')}"
        (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        report.draw(results).savefig(args.out / "loss.png", dpi=120)
        log_comparison(experiment, results, args.out)
    print(f"\n{text}\n{time.perf_counter() - begin:.0f} s in all")
    print(f"Written to {args.out} (table.md, results.json, loss.png) and {MLFLOW_URI}: make ui")


def trials(script: Path, args: argparse.Namespace) -> Iterator[tuple[str, Trial]]:
    """Names of methods and results of their trainings, seed by seed, so that those over one link come together."""
    methods = args.compare or DEMO
    with shaped_links.ranks(args.np) as ranks:
        for i, seed in enumerate(args.seeds):
            link = LOCAL if args.local else ranks.links[i % len(ranks.links)]
            for j, name in enumerate(methods, 1):
                done = f"{i * len(methods) + j}/{len(args.seeds) * len(methods)}"
                print(f"[{done}] {name}, seed {seed}, {link}", flush=True)
                yield name, train(script, args, ranks, link, name, seed)


def train(script: Path, args: argparse.Namespace, ranks: shaped_links.Ranks, link: str, name: str, seed: int) -> Trial:
    """One training's result; that of an earlier one, if its settings were the same."""
    stem = f"{name}-np{args.np}-seed{seed}"
    file, log, history = (args.out / f"{stem}{end}" for end in (".json", ".log", ".history"))
    words = [word for option in passed_on(args) for word in option]
    settings = {"words": words, "link": link}
    if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))["settings"] == settings:
        return known
    for old in (log, history):
        old.unlink(missing_ok=True)
    start, env = ranks.start(link)
    command = [*start, sys.executable, str(script), *words, "--method", name, "--seed", str(seed)]
    command += ["--history", str(history), "--mlflow-uri", MLFLOW_URI, "--run-name", f"{name}, seed {seed}, {link}"]
    why = launching.run(command, log, args.timeout, env, ROOT)
    if why or not history.exists():
        sys.exit(
            f"{script.stem}: {stem} {why or 'left no result'}; its output is above and in {log}. "
            "The same command goes on from here"
        )
    trial = {"settings": settings, "link": link, **json.loads(history.read_text(encoding="utf-8"))}
    file.write_text(json.dumps(trial), encoding="utf-8")
    history.unlink()
    return trial


def passed_on(args: argparse.Namespace) -> Iterator[list[str]]:
    """The options of a training, each as words of a command line."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if value is True and name not in OWN:
            yield [option]
        elif name not in OWN and value is not None and value is not False:
            yield [option, str(value)]


def log_comparison(experiment: Experiment, results: Mapping[str, list[Trial]], out: Path) -> None:
    """One MLflow run with the means over the seeds, the table and the picture."""
    keys = ("validation_loss", "sent_bytes", "dense_bytes", "tokens_per_second")
    metrics = {f"{name}/{key}": mean(found, key) for name, found in results.items() for key in keys}
    experiment.log("comparison", metrics, [out / file for file in ("table.md", "results.json", "loss.png")])

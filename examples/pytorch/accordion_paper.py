"""Runs the experiments of the Accordion paper: the relaxed level, the critical level and Accordion, for several seeds.

python examples/pytorch/accordion_paper.py --scale smoke        # digits and Python's help on two ranks, minutes
python examples/pytorch/accordion_paper.py --scale full --data FOLDER --np 4 --hosts a:1,b:1,c:1,d:1

Each training runs under horovodrun. Results, logs, checkpoints, table.md, results.json and curves.png are written to
build/paper/SCALE/. The same command resumes an interrupted run: it skips complete trainings, and continues a training from
its last epoch. That needs one checkpoint per rank and epoch, on a disk that all hosts share or that stays with its rank. At
full scale the table includes the figures of the authors' logs. Each training takes 300 epochs (the LSTM 90) and, for the
authors' rates, four ranks.

Differences from the authors' code:

* Residuals survive a change of level, and TopK has residuals. Gradients are averaged, not summed.
* The LSTM is clipped after the exchange, not before it. Its words are those of the files in lower case.
* Perplexity is computed from the mean over words. A mean over batches would be about 1 % higher.
* Batch-size runs use the rate 0.1 for a batch of 512, which the authors' logs leave open. The batch may shrink again when
  the rate drops.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import launching  # noqa: E402
from accordion_paper import experiments, launch, picture, table, tasks  # noqa: E402
from accordion_paper.experiments import Run  # noqa: E402

LIMITS = {"full": None, "smoke": 300.0, "tiny": 100.0}  # time limit of a training in seconds
METRICS = ("value", "floats", "sent_bytes", "dense_bytes", "seconds", "critical_fraction")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--scale",
    choices=experiments.SCALES,
    default="smoke",
    help="scale of the experiments: the paper's, minutes or seconds",
)
parser.add_argument("--list", action="store_true", help="only list the trainings and their state")
parser.add_argument("--only", metavar="GLOB", default="*", help="select trainings by name, EXPERIMENT/MODE/SEED")
parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: 1 2 3; at scale tiny 1")
parser.add_argument("--data", type=Path, metavar="PATH", help="the folder with CIFAR and WikiText-2, for --scale full")
parser.add_argument("--np", type=int, help="number of ranks; default: 4 at full scale, otherwise 2")
parser.add_argument("--hosts", help="hosts of the ranks, like horovodrun's -H")
parser.add_argument("--epochs", type=int, help="epochs of each schedule; milestones and intervals are scaled")
parser.add_argument("--dense", action="store_true", help="also train without compression")
parser.add_argument("--out", type=Path, help="folder of the results; default: build/paper/SCALE")
parser.add_argument(
    "--timeout", type=float, help="time limit of a training in seconds; default: 300, none at full scale"
)
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--train", metavar="NAME", help=argparse.SUPPRESS)  # set by the command that horovodrun starts


def main(args: argparse.Namespace) -> None:
    try:
        found = experiments.runs(args.scale, tuple(args.seeds), args.only, args.epochs, args.dense)
        for run in () if args.list else found:
            tasks.require_data(run, args.data)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if not found:
        parser.error(f"--only {args.only!r} matches no training; --list names them")
    ranks = args.np or experiments.RANKS[args.scale]
    out = (args.out or ROOT / "build" / "paper" / args.scale).resolve()
    if args.list:
        for run in found:
            print(f"{run.name}{'  done' if launch.finished(run, ranks, out) else ''}")
        return
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("accordion_paper: interrupted; the same command goes on from here"))
    with launching.alone(out):
        if args.mlflow_uri:
            mlflow_experiment(args.mlflow_uri)
        results: dict[Run, dict[str, Any]] = {}
        for i, run in enumerate(found, 1):
            if launch.finished(run, ranks, out) is None:
                print(f"[{i}/{len(found)}] {run.name}", flush=True)
                limit = args.timeout or LIMITS[args.scale]
                launch.start(run, ranks, out, command(args, run, out), args.hosts, limit)
            results[run] = launch.finished(run, ranks, out) or {}
            report(results, out)
        if args.mlflow_uri:
            log(args.mlflow_uri, results, out)
    print(f"\n{(out / 'table.md').read_text(encoding='utf-8')}\n{ranks} ranks; written to {out}")


def command(args: argparse.Namespace, run: Run, out: Path) -> list[str]:
    """Returns the command of a rank: this file, with arguments that select the training."""
    words = [str(Path(__file__).resolve()), "--scale", args.scale, "--out", str(out), "--train", run.name]
    for name in ("data", "epochs", "mlflow_uri"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value.resolve() if name == "data" else value)]
    return words


def train(args: argparse.Namespace) -> None:
    """Runs the selected training on each rank."""
    from accordion_paper.training import train

    seed = int(args.train.rsplit("/", 1)[1])
    (run,) = experiments.runs(args.scale, (seed,), args.train, args.epochs, dense=True)
    train(run, args.out, args.data, args.mlflow_uri, progress=True)


def report(results: Mapping[Run, Mapping[str, Any]], out: Path) -> None:
    """Writes table, figure and numbers of the results so far."""
    shown = list({run.experiment.name: run.experiment for run in results}.values())
    (out / "table.md").write_text(table.markdown(table.cells(results), shown) + "\n", encoding="utf-8")
    everything = {run.name: {key: result[key] for key in METRICS} for run, result in results.items()}
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    picture.curves(results, shown).savefig(out / "curves.png", dpi=120)


def mlflow_experiment(uri: str) -> str:
    """Creates MLflow's experiment before several processes would do so at once."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    known = client.get_experiment_by_name("accordion_paper")
    return known.experiment_id if known else client.create_experiment("accordion_paper")


def log(uri: str, results: Mapping[Run, Mapping[str, Any]], out: Path) -> None:
    """Logs the results of all trainings as one MLflow run. Each training has logged its own run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    mine = client.create_run(mlflow_experiment(uri), run_name="table").info.run_id
    for (name, mode), cell in table.cells(results).items():
        for key in ("value", "floats", "sent_bytes", "seconds"):
            client.log_metric(mine, f"{name}/{mode}/{key}", getattr(cell, key))
    for file in ("table.md", "results.json", "curves.png"):
        client.log_artifact(mine, str(out / file))
    client.set_terminated(mine)


if __name__ == "__main__":
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments)
    else:
        main(arguments)

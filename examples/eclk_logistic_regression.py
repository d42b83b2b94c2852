"""ECLK and its siblings on logistic regression: rounds and bits to a suboptimality of 1e-10.

python examples/eclk_logistic_regression.py --simulate 10          # ten nodes in this process
horovodrun -np 4 python examples/eclk_logistic_regression.py       # one on each rank, hvd_accordion.torch's optimizers

Breast cancer (569 rows, 30 features) and MNIST (1,000 images, digits 0-4 against 5-9) with L2 and with L1 + L2, and with
`--problem multinomial` MNIST's ten classes, 7,850 parameters, to 1e-6. The nodes have different data: rows are divided by
the first feature, or by digit. Methods use full local gradients. Prints a table, and writes it and two figures, P - P* over
rounds and over bits, to build/eclk/.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for such short vectors, more threads only wait for each other

from eclk import methods, report, runs  # noqa: E402
from eclk.methods import Entry  # noqa: E402
from eclk.runs import Outcome  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--simulate", type=int, metavar="N", help="N nodes in one process instead of Horovod's ranks")
parser.add_argument(
    "--problem", nargs="+", choices=runs.PROBLEMS, default=[p for p in runs.PROBLEMS if p != "multinomial"]
)
parser.add_argument("--method", nargs="+", choices=methods.CLASSES, default=list(methods.CLASSES))
parser.add_argument("--tolerance", type=float, help="on P - P*; by default 1e-10, multinomial 1e-6")
parser.add_argument(
    "--cap", type=int, help="maximal rounds of a method; by default 12,000, MNIST 6,000, multinomial 5,000"
)
parser.add_argument("--ridge", type=float, help="strong convexity, instead of the problem's own; > 0")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--tune", action="store_true", help="search the settings again (simulated; an hour or so)")
parser.add_argument("--jobs", type=int, default=2, help="processes of a simulation")
parser.add_argument("--out", type=Path, default=ROOT / "build" / "eclk", help="the folder of tables and pictures")
parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")


def main(args: argparse.Namespace) -> None:
    if args.ridge is not None and not args.ridge > 0:
        parser.error(f"--ridge must be > 0, got {args.ridge}: without it nothing proves how near P is to P*")
    if args.tune and args.simulate is None:
        parser.error("--tune needs --simulate N")
    rows = [(name, entry) for name in args.problem for entry in methods.entries(name, not args.tune)]
    tasks = [(name, entry) for name, entry in rows if entry.method in args.method]
    found = []
    for outcome in simulated(args, tasks) if args.simulate is not None else on_ranks(args, tasks):
        found.append(outcome)
        end = "" if outcome.reached else ", not below the tolerance"
        said = f"{outcome.rounds:,} rounds, {outcome.kilobits:,.0f} kbit, {outcome.seconds:.1f} s, "
        print(
            f"[{len(found)}/{len(tasks)}] {outcome.data}: {outcome.label}: {said}{outcome.suboptimality:.1e}{end}",
            flush=True,
        )
    if not found:  # all ranks but the first
        return
    text = report.write(found, args.out)
    if args.json:
        report.write_json(found, args.json)
    if args.mlflow_uri:
        report.log(found, args.out, args.mlflow_uri, "eclk_logistic_regression")
    print(f"\n{text}\n\n{report.COUNTED}\nWritten to {args.out}")


def goal(args: argparse.Namespace, name: str) -> tuple[float, int]:
    """Returns tolerance and maximal rounds."""
    return args.tolerance or runs.TOLERANCES[name], args.cap or runs.CAPS[name]


def simulated(args: argparse.Namespace, tasks: list[tuple[str, Entry]]) -> Iterator[Outcome]:
    """Runs all tasks, `--jobs` at a time, and returns their results in order."""
    work = runs.tune if args.tune else runs.simulate
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        futures = [
            pool.submit(work, entry, name, args.simulate, *goal(args, name), args.seed, args.ridge)
            for name, entry in tasks
        ]
        yield from (future.result() for future in futures)


def on_ranks(args: argparse.Namespace, tasks: list[tuple[str, Entry]]) -> Iterator[Outcome]:
    """Runs the tasks with Horovod. Every rank computes P from all data, so all stop at the same round."""
    from eclk.ranks import OnRanks

    import hvd_accordion.torch as hvd

    hvd.init()
    for name, entry in tasks:
        problem, best = runs.prepared(name, hvd.size(), args.ridge)
        cluster = OnRanks(entry, problem, args.seed)
        outcome = runs.follow(entry, problem, best, cluster, *goal(args, name), args.seed)
        if hvd.rank() == 0:
            yield outcome


if __name__ == "__main__":
    main(parser.parse_args())

"""Measures the seconds until the demo's network reaches the accuracy of dense training over a slow link.

python examples/benchmarks/time_to_accuracy.py [--seeds 1,2,42] [--link 100mbit] [--hosts 2] [--epochs 15]

The hosts are network namespaces of this machine, so it needs root. The time is that of training, without evaluation.
Writes accuracy.md, accuracy.json and accuracy.png to build/bench/.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hosts import Network, environment, hosts, mpirun, write_agent
from links_report import markdown
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "bench"
SCRIPT = ROOT / "examples" / "pytorch" / "pytorch_mnist.py"
DENSE = "Horovod, dense"
RUNS = {
    DENSE: ["--compression", "none"],
    "PowerSGD, critical only": ["--compression", "powersgd", "--level", "critical"],
    "PowerSGD, relaxed only": ["--compression", "powersgd", "--level", "relaxed"],
    "Accordion over PowerSGD": ["--compression", "accordion-powersgd"],
}
COLOURS = dict(zip(RUNS, ("#000000", "#009E73", "#56B4E9", "#D55E00"), strict=True))  # Okabe-Ito
Curve = list[tuple[float, float]]  # seconds and accuracy at the end of each epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 42])
    parser.add_argument("--link", default="100mbit", help="rate as tc writes it")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--cycle-time", type=float, default=1.0, help="HOROVOD_CYCLE_TIME in ms")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one training may take")
    args = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("time_to_accuracy: interrupted"))
    (OUT / "logs").mkdir(parents=True, exist_ok=True)
    curves: dict[int, dict[str, Curve]] = {}
    with hosts(args.hosts, args.link) as network:
        for seed in args.seeds:
            curves[seed] = {}
            for name in RUNS:
                curve = curves[seed][name] = train(network, name, seed, args)
                print(f"seed {seed}, {name}: {curve[-1][1]:.1%} after {curve[-1][0]:.0f} s", flush=True)

    title = f"The demo's network on MNIST, {args.hosts} hosts, {args.link}, {args.epochs} epochs"
    text = f"{title}\n\n{table(curves)}\n\n{speed_ups(curves)}"
    (OUT / "accuracy.md").write_text(text + "\n", encoding="utf-8")
    result = {"arguments": vars(args), "curves": curves}
    (OUT / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(curves, title).savefig(OUT / "accuracy.png", dpi=120)
    print(f"\n{text}\n\nWritten to {OUT.relative_to(ROOT)}/: accuracy.md, accuracy.json, accuracy.png")


def train(network: Network, name: str, seed: int, args: argparse.Namespace) -> Curve:
    log = OUT / "logs" / f"accuracy-{seed}-{name.replace(', ', '-').replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder, open(log, "wb") as output:
        history = Path(folder) / "history.json"
        command = [*mpirun(network, write_agent(network, Path(folder))), sys.executable, str(SCRIPT), *RUNS[name]]
        command += ["--seed", str(seed), "--epochs", str(args.epochs), "--history", str(history), "--no-progress"]
        process = network.start(0, command, environment(args.cycle_time), output)
        try:
            code = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            sys.exit(f"time_to_accuracy: {name!r} took longer than {args.timeout:g} s; see {log.relative_to(ROOT)}")
        if code:
            sys.exit(f"time_to_accuracy: {name!r} ended with exit status {code}; see {log.relative_to(ROOT)}")
        found = json.loads(history.read_text(encoding="utf-8"))
    return [(seconds, point[1]) for seconds, point in zip(found["clock"], found["points"], strict=True)]


def reached(curve: Curve, accuracy: float) -> float | None:
    """Returns the seconds until the end of the first epoch with this accuracy."""
    return next((seconds for seconds, there in curve if there >= accuracy), None)


def table(curves: dict[int, dict[str, Curve]]) -> str:
    cells = [["run", "seed", "final accuracy", "seconds to dense's final accuracy", "speed-up", "seconds in all"]]
    for name in RUNS:
        for seed, runs in curves.items():
            when, dense = times(runs, name)
            found = ["not reached", ""] if when is None else [f"{when:.1f}", f"{dense / when:.1f}"]
            cells.append([name, str(seed), f"{runs[name][-1][1]:.1%}", *found, f"{runs[name][-1][0]:.1f}"])
    return markdown(cells)


def speed_ups(curves: dict[int, dict[str, Curve]]) -> str:
    """Returns (lower) medians over the seeds. A seed that misses the accuracy has a speed-up of 0."""
    found: dict[str, Any] = {}
    for name in list(RUNS)[1:]:
        pairs = [times(runs, name) for runs in curves.values()]
        median = statistics.median_low(dense / when if when else 0.0 for when, dense in pairs)
        found[name] = f"{median:.1f}" if median else "not reached"
    return "Median speed-up over dense: " + "; ".join(f"{name} {value}" for name, value in found.items()) + "."


def times(runs: dict[str, Curve], name: str) -> tuple[float | None, float]:
    """Returns the seconds of the run and of dense training until the final accuracy of dense training."""
    target = runs[DENSE][-1][1]
    dense = reached(runs[DENSE], target)
    assert dense is not None
    return reached(runs[name], target), dense


def draw(curves: dict[int, dict[str, Curve]], title: str) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for runs in curves.values():
        for name, curve in runs.items():
            axes.plot(*zip(*curve, strict=True), color=COLOURS[name], marker="o", markersize=3, linewidth=1, alpha=0.8)
    for name, colour in COLOURS.items():
        axes.plot([], [], color=colour, marker="o", markersize=4, label=name)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.set_title(f"{title}; a line for each seed", fontsize=10)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()

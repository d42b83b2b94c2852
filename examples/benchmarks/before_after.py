"""Compares the step time of this checkout with another checkout, such as the last release.

git worktree add ../before COMMIT
python examples/benchmarks/before_after.py ../before [--modes "PowerSGD(4),QSGD(7)"] [--links 1gbit]

The hosts are network namespaces of this machine, so it needs root. The modes of both checkouts run in turns. A
ratio compares two turns of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from fleet import fleet
from hosts import hosts
from links import OUT, UNSHAPED
from links_report import markdown
from models import BATCHES
from modes import BEFORE, MODES
from side_by_side import order

HERE = Path(__file__).resolve().parents[2]


def main() -> None:
    args = arguments()
    (logs := OUT / "logs").mkdir(parents=True, exist_ok=True)
    names = [name.strip() for name in args.modes.split(",")]
    modes = {}
    for name in names:
        modes[name] = replace(MODES[name], checkout=str(HERE))
        modes[name + BEFORE] = replace(MODES[name], name=name + BEFORE, checkout=str(args.before))
    with hosts(2) as network, fleet(network, args.model, 1.0, logs) as ready:
        for mode in modes.values():
            ready.start(mode)
            ready.turn(mode, mode.warmup)
        for link in args.links.split(","):
            network.set_rate(None if link == UNSHAPED else link)
            for mode in modes.values():
                ready.turn(mode, 1)
            seconds: dict[str, list[float]] = {name: [] for name in modes}
            for i in range(args.rounds):
                for name in order(list(modes), i):
                    seconds[name].append(ready.turn(modes[name], args.steps).seconds)
            print(f"\n{args.model}, batch {BATCHES[args.model]}, 2 hosts, {link}, {args.rounds} rounds\n")
            print(markdown([["mode", "before, ms", "now, ms", "now / before"], *rows(names, seconds)]), flush=True)


def rows(names: list[str], seconds: dict[str, list[float]]) -> list[list[str]]:
    found = []
    for name in names:
        now, before = seconds[name], seconds[name + BEFORE]
        ratio = statistics.median(a / b for a, b in zip(now, before, strict=True))
        times = [f"{1e3 * statistics.median(times):,.1f}" for times in (before, now)]
        found.append([name, *times, f"{ratio:.3f}"])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout's folder")
    parser.add_argument("--modes", default="None,PowerSGD(4),TopK(0.01),QSGD(7)", help=", ".join(MODES))
    parser.add_argument("--model", choices=BATCHES, default="resnet18")
    parser.add_argument("--links", default="1gbit", help="rates as tc writes them, or unshaped")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each mode")
    parser.add_argument("--steps", type=int, default=12, help="steps of a turn")
    args = parser.parse_args()
    args.before = args.before.resolve()
    if not (args.before / "hvd_accordion").is_dir():
        sys.exit(f"before must be a checkout of this project, got {args.before}")
    return args


if __name__ == "__main__":
    main()

"""Compares step times over links of limited rate: this package's optimizers, Horovod's and DDP's.

python examples/benchmarks/links.py [--models resnet18] [--hosts 2] [--links 100mbit,unshaped] [--modes "Horovod,DDP"]

The hosts are network namespaces of this machine, so it needs root. The modes of a model run in turns, and each
round starts with another one. Meanwhile the other modes are stopped. Writes links.md, links.json and links.png to
build/bench/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fleet import Failure, Fleet, Turn, fleet
from hosts import hosts
from links_report import draw, table
from models import BATCHES
from modes import MODES, Mode
from side_by_side import order

OUT = Path(__file__).resolve().parents[2] / "build" / "bench"
UNSHAPED = "unshaped"
SLOW, SELDOM = 5.0, 3  # a mode whose shortest turn takes longer than SLOW seconds runs in one of SELDOM rounds only


def main() -> None:
    args = arguments()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("links: interrupted"))
    (logs := OUT / "logs").mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"facts": facts(args), "failures": [], "measured": []}
    begin = time.perf_counter()
    for model in args.models:
        for count in args.hosts:
            with hosts(count) as network, fleet(network, model, args.cycle_time, logs) as ready:
                network.burst = args.burst
                for link in args.links:
                    network.set_rate(None if link == UNSHAPED else link)
                    turns = measure(ready, link, args, result["failures"])
                    result["measured"].append({"model": model, "hosts": count, "link": link, "turns": turns})
                    result["facts"]["minutes"] = round((time.perf_counter() - begin) / 60, 1)
                    write(result)  # after each, so that an interrupted run keeps its results
                    print(f"\n{table(result['measured'][-1])}\n", flush=True)
    print(f"Written to {OUT.relative_to(OUT.parents[1])}/: links.md, links.json, links.png")
    sys.exit("\n".join(result["failures"]) or 0)


def measure(ready: Fleet, link: str, args: argparse.Namespace, failures: list[str]) -> list[dict[str, Any]]:
    """Runs the turns of every mode over one link. A mode that fails is skipped from then on."""
    turns: list[dict[str, Any]] = []
    lost: set[str] = set()
    pace: dict[str, float] = {}

    def take(name: str, steps: int) -> Turn | None:
        try:
            turn = ready.turn(MODES[name], steps)
        except Failure as failure:
            lose(name, failure)
            return None
        pace[name] = turn.seconds
        return turn

    def lose(name: str, failure: Failure) -> None:
        lost.add(name)
        failures.append(f"links: {ready.model}, {len(ready.network.addresses)} hosts, {link}: {name}: {failure}")
        print(failures[-1], file=sys.stderr, flush=True)

    for name in args.modes:
        note(f"{ready.model}, {len(ready.network.addresses)} hosts, {link}: warm-up of {name}")
        try:
            warm_up(ready, MODES[name])
        except Failure as failure:
            lose(name, failure)
        else:
            take(name, 1)  # measures its speed over this link
    for i in range(args.rounds):
        for name in order(args.modes, i):
            if name in lost or (i % SELDOM and args.steps * pace[name] > SLOW):
                continue
            note(f"{ready.model}, {len(ready.network.addresses)} hosts, {link}: round {i + 1} of {args.rounds}, {name}")
            if turn := take(name, max(args.steps, round(args.seconds / pace[name]))):
                turns.append({"round": i, "mode": name, **turn._asdict()})
    return turns


def warm_up(ready: Fleet, mode: Mode) -> None:
    """Starts the mode if necessary and runs its first steps, over an unshaped link unless it adapts to the link."""
    rate = ready.network.rate
    if mode.adapts and mode.name in ready.crews:
        ready.end(mode)
    if mode.name not in ready.crews:
        ready.start(mode)
        if not mode.adapts:
            ready.network.set_rate(None)
        ready.turn(mode, mode.warmup)
        ready.network.set_rate(rate)


def note(text: str) -> None:
    """Shows the progress in one line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(known: dict[str, Any]) -> Any:
        def names(text: str) -> list[str]:
            found = [name.strip() for name in text.split(",")]
            if unknown := [name for name in found if name not in known]:
                raise argparse.ArgumentTypeError(f"no {unknown[0]!r} among {', '.join(known)}")
            return found

        return names

    parser.add_argument("--models", type=several(BATCHES), default=list(BATCHES), help=", ".join(BATCHES))
    parser.add_argument("--modes", type=several(MODES), default=list(MODES), help=", ".join(MODES))
    parser.add_argument(
        "--hosts",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[2],
        help="numbers of hosts, such as 2,4",
    )
    links = "rates as tc writes them, or unshaped"
    parser.add_argument(
        "--links", type=lambda text: text.split(","), default=["100mbit", "1gbit", UNSHAPED], help=links
    )
    parser.add_argument("--burst", default="512kb", help="bytes that a shaped link passes at once after a pause")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each mode over each link")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate duration of a turn")
    parser.add_argument("--steps", type=int, default=2, help="minimal steps of a turn")
    parser.add_argument("--cycle-time", type=float, default=1.0, help="HOROVOD_CYCLE_TIME in ms, of all Horovod modes")
    return parser.parse_args()


def facts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "horovod")},
        "threads of a rank": 1,
        "cycle time, ms": args.cycle_time,
        "burst": args.burst,
        "batch of a rank": {name: BATCHES[name] for name in args.models},
        "load average at the start": os.getloadavg()[0],
    }


def write(result: dict[str, Any]) -> None:
    known = result["facts"]
    lines = [f"{known['cores']} cores, one thread a rank; torch {known['torch']}, Horovod {known['horovod']} over MPI"]
    lines[0] += f" with a cycle time of {known['cycle time, ms']:g} ms, DDP over gloo; bursts of {known['burst']} pass"
    lines[0] += f" unshaped; {known['minutes']} minutes."
    lines += [table(part) for part in result["measured"]]
    lines += [f"Failed: {failure}" for failure in result["failures"]]
    (OUT / "links.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (OUT / "links.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["measured"]).savefig(OUT / "links.png", dpi=120)


if __name__ == "__main__":
    main()

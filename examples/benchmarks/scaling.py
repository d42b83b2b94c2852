"""Measures how exchanges scale on a few hosts, and predicts many hosts.

python examples/benchmarks/scaling.py [--ranks 2,4,8] [--links 100mbit,1gbit] [--compute-seconds 0.1] [--again]

The hosts are network namespaces of this machine, so it needs root. Only exchanges are measured, without training,
because many ranks on few cores would measure the cores. Writes scaling.md, scaling.json and scaling.png to build/bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hosts import Network, environment, hosts, mpirun, write_agent
from scaling_report import UNSHAPED, analysis, draw, nominal, page

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "bench"
FILE = OUT / "scaling.json"
WORKER = Path(__file__).with_name("scaling_worker.py")
PATIENCE = 600  # seconds for one number of ranks over one link


def main() -> None:
    args = arguments()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("scaling: interrupted"))
    (OUT / "logs").mkdir(parents=True, exist_ok=True)
    if args.again:
        measured = json.loads(FILE.read_text())["measured"]
    else:
        measured = measure(args)
    result = analysis(measured, args.compute_seconds, args.latency, os.cpu_count() or 1)
    result["facts"] |= {"cycle time, ms": args.cycle_time}
    FILE.write_text(json.dumps({**result, "measured": measured}, indent=1) + "\n")
    (OUT / "scaling.md").write_text(page(result))
    draw(result).savefig(OUT / "scaling.png", dpi=110)
    print(f"{page(result)}\nWritten to {OUT.relative_to(ROOT)}/: scaling.md, scaling.json, scaling.png")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures two ranks without limit, for the time of compression, then all numbers of ranks over all links."""
    found = []
    for count in args.ranks:
        with hosts(count) as network, tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            for link in [*([UNSHAPED] if count == min(args.ranks) else []), *args.links]:
                shape(network, link)
                begin = time.perf_counter()
                part = ranks(network, link, args.cycle_time, Path(folder))
                seconds = time.perf_counter() - begin
                found.append({"ranks": count, "link": link, "load": os.getloadavg()[0], **part})
                FILE.write_text(
                    json.dumps({"measured": found}, indent=1) + "\n"
                )  # an interrupted run keeps its results
                print(f"{count} ranks, {link}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def shape(network: Network, link: str) -> None:
    """Uses a burst of some 5 ms of the link, so that little accumulates while the ranks compress.

    It is larger than a kernel's packet of 64 kB: smaller ones would be split, and their headers counted.
    """
    if link != UNSHAPED:
        network.burst = f"{max(80 * 1024, int(nominal(link) * 0.005))}b"
    network.set_rate(None if link == UNSHAPED else link)


def ranks(network: Network, link: str, cycle_time: float, folder: Path) -> dict[str, Any]:
    """Runs one rank on each host."""
    name = f"scaling-{len(network.addresses)}-{link}"
    file, log = folder / f"{name}.json", OUT / "logs" / f"{name}.log"
    command = [*mpirun(network, write_agent(network, folder)), sys.executable, str(WORKER), str(file)]
    with open(log, "wb") as output:
        process = network.start(0, [*command, str(nominal(link))], environment(cycle_time), output)
        try:
            status: Any = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f"nothing after {PATIENCE} s"
    if status != 0:
        sys.exit(f"scaling: {name}: {status}, see {log.relative_to(ROOT)}")
    return json.loads(file.read_text())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--links", type=lambda text: text.split(","), default=["100mbit", "1gbit"])
    parser.add_argument("--cycle-time", type=float, default=1.0, help="HOROVOD_CYCLE_TIME in ms")
    parser.add_argument("--compute-seconds", type=float, help="seconds of forward and backward; default: measured here")
    parser.add_argument("--latency", type=float, default=5e-5, help="seconds per hop assumed for the prediction")
    parser.add_argument("--again", action="store_true", help="predict from the last run's measurements")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Step time of this package's optimizers against Horovod's own, side by side in one run.

Every mode trains its own copy of the network; the modes take turns, a few steps each, so that a slow spell of the
machine hits all alike. What counts is the median of the ratios to Horovod's turn of the same round.

    python examples/benchmarks/overhead.py [--model resnet18|small] [--rounds 15] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RANKS = 2


def launch(arguments: list[str]) -> int:
    """This script again, under horovodrun, one thread a rank, the same cycle time for all modes."""
    same = {"HOROVOD_CYCLE_TIME": "1", "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}
    env = {**same, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", **os.environ}
    horovodrun = Path(sys.executable).parent / "horovodrun"
    command = [str(horovodrun), "-np", str(RANKS), sys.executable, __file__, "--worker", *arguments]
    return subprocess.run(command, env=env, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["resnet18", "small"], default="resnet18")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps of a mode's turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.worker:
        sys.exit(launch(sys.argv[1:]))

    import horovod.torch as horovod
    import models
    import torch

    import hvd_accordion.torch as hvd
    from hvd_accordion import Accordion, Dense, PowerSGD, TopK

    hvd.init()
    torch.set_num_threads(1)
    modes = {
        "horovod": (horovod, {}),
        "compression=None": (hvd, {"compression": None}),
        "Dense()": (hvd, {"compression": Dense()}),
        "PowerSGD(4)": (hvd, {"compression": PowerSGD(4)}),
        "Accordion()": (hvd, {"compression": Accordion(interval=1), "steps_per_epoch": 1000}),
        "TopK(0.01)": (hvd, {"compression": TopK(0.01)}),
    }
    trainings = {}
    for name, (module, options) in modes.items():
        torch.manual_seed(0)
        net = models.resnet18() if args.model == "resnet18" else models.small_cnn()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        trainings[name] = net, module.DistributedOptimizer(optimizer, net.named_parameters(), **options)
    images = torch.randn(args.batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (args.batch_size,))

    def turn(name: str) -> float:
        net, optimizer = trainings[name]
        hvd.barrier()
        begin = time.perf_counter()
        for _ in range(args.steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        return (time.perf_counter() - begin) / args.steps

    for name in modes:
        turn(name)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in modes}
    for i in range(args.rounds):
        order = list(modes)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(turn(name))
    if hvd.rank() == 0:
        rows = []
        for name in modes:
            ratios = [mine / theirs for mine, theirs in zip(times[name], times["horovod"], strict=True)]
            rows.append(
                {"mode": name, "step_seconds": statistics.median(times[name]), "ratio": statistics.median(ratios)}
            )
        lines = [f"{args.model}, batch {args.batch_size}, {RANKS} ranks, one thread each, unshaped link"]
        lines += [
            f"{r['mode']:<18} {1e3 * r['step_seconds']:8.1f} ms a step   {r['ratio']:.3f} of Horovod" for r in rows
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

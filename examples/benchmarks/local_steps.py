"""Measures what local steps cost where nothing is exchanged, and the slowest step with fragments; two ranks, this machine.

python examples/benchmarks/local_steps.py [--model resnet18] [--rounds 8] [--every 20] [--json PATH]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from links_report import markdown
from side_by_side import launch, parser

ALONE = "the optimizer alone"
MODES: dict[str, Callable[[int], dict[str, int]]] = {  # arguments of LocalSteps, from the interval
    ALONE: lambda every: {},
    "local steps": lambda every: {"every": every},
    "a fragment each step": lambda every: {"every": every, "fragments": every},
    "a fragment each step, delay 2": lambda every: {"every": every, "fragments": every, "delay": 2},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="resnet18")
    options.add_argument("--rounds", type=int, default=8, help="turns of each mode")
    options.add_argument("--every", type=int, default=20, help="steps of a turn, and between two exchanges")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    if args.worker:
        work(args.model, args.rounds, args.every, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        sizes = "--model", args.model, "--rounds", str(args.rounds), "--every", str(args.every), "--out", str(out)
        if launch(__file__, *sizes):
            sys.exit("local_steps: the ranks failed")
        found: dict[str, list[list[float]]] = json.loads(out.read_text())
    print(f"{args.model}, 2 ranks, EFSignSGD, every {args.every} steps, {args.rounds} interleaved turns of as many\n")
    print(
        markdown(
            [["mode", "step, ms", "of the optimizer alone", "slowest step of a turn, of its median"], *rows(found)]
        )
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def rows(found: dict[str, list[list[float]]]) -> list[list[str]]:
    """Of each mode: median of its turns' medians, median ratio to the turn of the bare optimizer, median slowest step."""
    alone = [statistics.median(turn) for turn in found[ALONE]]
    table = []
    for mode, turns in found.items():
        medians = [statistics.median(turn) for turn in turns]
        ratio = statistics.median(m / a for m, a in zip(medians, alone, strict=True))
        slowest = statistics.median(max(turn) / m for turn, m in zip(turns, medians, strict=True))
        table.append([mode, f"{1e3 * statistics.median(medians):.1f}", f"{ratio:.3f}", f"{slowest:.2f}"])
    return table


def work(model: str, rounds: int, every: int, out: Path) -> None:
    """Steps each mode's own copy of the model in turns; rank 0 writes the seconds of each step."""
    import torch
    from models import TASKS

    import hvd_accordion.torch as hvd
    from hvd_accordion import EFSignSGD, LocalSteps

    hvd.init()
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], Any]] = {}
    for mode, arguments in MODES.items():
        task = TASKS[model]()
        optimizer: Any = torch.optim.SGD(task.network.parameters(), lr=0.001, momentum=0.9)
        hvd.broadcast_parameters(task.network.state_dict(), 0)
        if mode != ALONE:
            local = LocalSteps(**arguments(every))
            named = task.network.named_parameters()
            optimizer = hvd.DistributedOptimizer(optimizer, named, compression=EFSignSGD(), local_steps=local)
        steps[mode] = stepper(task, optimizer)
    found: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for turn in range(-1, rounds):  # the first warms up
        for mode, step in steps.items():
            hvd.allreduce(torch.zeros(1))  # ranks begin together
            seconds = []
            for _ in range(every):
                begin = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - begin)
            if turn >= 0:
                found[mode].append(seconds)
    if hvd.rank() == 0:
        out.write_text(json.dumps(found))


def stepper(task: Any, optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        inputs, targets = task.batch()
        optimizer.zero_grad()
        task.loss(task.network(inputs), targets).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()

"""Shows how the exchange overlaps with backward: one step's collectives, from Horovod's timeline, beside its computation.

python examples/benchmarks/overlap.py [--model resnet18] [--compression "PowerSGD(4)"]

Writes to build/bench/: overlap.png, and for chrome://tracing or Perfetto the traces of the figure, timeline.json of
Horovod and profile.json of torch's profiler (rank 0).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from modes import MODES
from side_by_side import launch, parser

OUT = Path(__file__).resolve().parents[2] / "build" / "bench"
PHASES = ("forward", "backward", "rest of the exchange", "optimizer")
Span = tuple[str, float, float]  # name, begin and end in ms


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="resnet18")
    options.add_argument("--compression", default="PowerSGD(4)", choices=[m for m in MODES if m.endswith(")")])
    args = options.parse_args()
    if args.worker:
        work(args.model, args.compression)
        return
    OUT.mkdir(parents=True, exist_ok=True)
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    if code := launch(__file__):
        sys.exit(code)
    phases = json.loads((OUT / "phases.json").read_text())
    zero, end = phases[0][1], phases[-1][2]
    rounds = since(zero, collectives((OUT / "timeline.json").read_text(), zero, end))
    phases = since(zero, phases)
    backward = phases[1]
    inside = sum(min(end, backward[2]) - begin for _, begin, end in rounds if begin < backward[2])
    share = inside / max(1e-9, sum(end - begin for _, begin, end in rounds))
    print(
        f"{args.model}, {args.compression}: {len(rounds)} collectives, {share:.0%} of their time before the end of backward"
    )
    for name, begin, end in [*phases, *rounds]:
        print(f"  {begin:7.1f} to {end:7.1f} ms  {name}")
    draw(phases, rounds).savefig(OUT / "overlap.png", dpi=120)


def work(model: str, compression: str) -> None:
    """Runs warm-up steps, then one step under both tracers."""
    import horovod.torch as hvd
    import torch
    from models import TASKS

    hvd.init()
    torch.set_num_threads(1)
    task = TASKS[model]()
    net, optimizer = MODES[compression].make(task.network)

    def step() -> list[float]:
        inputs, targets = task.batch()
        optimizer.zero_grad()
        times = [time.time()]
        loss = task.loss(net(inputs), targets)
        times.append(time.time())
        loss.backward()
        times.append(time.time())
        optimizer.synchronize()
        times.append(time.time())
        with optimizer.skip_synchronize():
            optimizer.step()
        return [*times, time.time()]

    for _ in range(MODES[compression].warmup + 3):
        step()
    hvd.start_timeline(str(OUT / "timeline.json"))
    time.sleep(0.2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    hvd.barrier()
    times = step()  # without the cost of the profiler
    hvd.stop_timeline()
    if hvd.rank() == 0:
        profile.export_chrome_trace(str(OUT / "profile.json"))
        spans = list(zip(PHASES, times, times[1:], strict=False))
        (OUT / "phases.json").write_text(json.dumps(spans))


def collectives(text: str, begin: float, end: float) -> list[Span]:
    """Returns the collectives requested between two times (seconds since the epoch), negotiation included."""
    events = json.loads(text if text.rstrip().endswith("]") else text.rstrip().rstrip(",") + "]")
    zero, names = 0.0, {}
    opened: dict[int, list[tuple[str, float]]] = {}  # nested activities of each tensor
    asked: dict[int, float] = {}
    found: dict[str, tuple[float, float]] = {}  # a grouped collective has an event per tensor
    for event in events:
        tensor, at = event["pid"], zero + event.get("ts", 0) / 1e6
        if event["ph"] == "M":
            zero = event["args"].get("start_time_since_epoch_in_micros", 1e6 * zero) / 1e6
            names[tensor] = event["args"].get("name", names.get(tensor))
        elif event["ph"] == "B":
            opened.setdefault(tensor, []).append((event["name"], at))
        elif event["ph"] == "E" and opened.get(tensor):
            activity, since = opened[tensor].pop()
            if activity.startswith("NEGOTIATE"):
                asked[tensor] = since
            elif not opened[tensor] and begin <= asked.get(tensor, 0.0) <= end:
                first, last = found.get(short(names[tensor]), (asked[tensor], at))
                found[short(names[tensor])] = min(first, asked.pop(tensor)), max(last, at)
    return [(name, first, last) for name, (first, last) in found.items()]


def since(zero: float, spans: list[Any]) -> list[Span]:
    """Converts to ms since that time."""
    return [(name, 1e3 * (begin - zero), 1e3 * (end - zero)) for name, begin, end in spans]


def draw(phases: list[Any], rounds: list[Span]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.22 * len(rounds)), layout="constrained")
    axes = figure.subplots()
    colours = ("0.75", "tab:blue", "tab:orange", "0.55")
    for (name, begin, end), colour in zip(phases, colours, strict=True):
        axes.barh(0, end - begin, left=begin, color=colour, label=name, height=0.8)
    for row, (_, begin, end) in enumerate(rounds, 1):
        axes.barh(row, end - begin, left=begin, color="tab:green", height=0.6)
    axes.barh(0, 0, color="tab:green", label="a collective, request to end")
    axes.axvline(phases[1][2], color="tab:blue", linewidth=1, linestyle=":")
    axes.set_yticks([0, *range(1, len(rounds) + 1)], ["step", *(name for name, _, _ in rounds)], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms since the step began")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.25 if len(rounds) < 6 else -0.12), ncol=5, fontsize=7, frameon=False
    )
    return figure


def short(name: str) -> str:
    """Returns group and round from the name of a collective."""
    return re.sub(r"_\d+of\d+$", "", name.split("hvd_accordion.")[-1]).split(".", 1)[-1]


if __name__ == "__main__":
    main()

"""Measures the additional memory of compression: the peak of a process compared with plain Horovod.

python examples/benchmarks/memory.py [--model resnet18] [--steps 20] [--json PATH]
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import launch, parser

PLAIN = "compression=None"
MODES: dict[str, Callable[[Any], Any]] = {  # builds the compression from the package
    PLAIN: lambda package: None,
    "PowerSGD(4)": lambda package: package.PowerSGD(4),
    'Accordion(norm="sampled")': lambda package: package.Accordion(norm="sampled"),
    'Accordion(norm="exact")': lambda package: package.Accordion(norm="exact"),
    "TopK(0.01)": lambda package: package.TopK(0.01),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="resnet18")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--mode", choices=MODES)
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    if args.worker:
        work(args.model, args.mode, args.steps, args.out)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            out = Path(folder) / "peak.json"
            if launch(__file__, "--mode", mode, "--model", args.model, "--steps", str(args.steps), "--out", str(out)):
                sys.exit(f"memory: {mode} failed")
            found[mode] = json.loads(out.read_text())
    gradients = found[PLAIN]["gradients"]
    rows = [
        ["mode", "peak MB", "beyond plain Horovod, of the gradients' size", "kept in tensors, of the gradients' size"]
    ]
    for mode, got in found.items():
        more, kept = (got["peak"] - found[PLAIN]["peak"]) / gradients, got["kept"] / gradients
        rows.append([f"`{mode}`", f"{got['peak'] / 1e6:.0f}", f"{more:.2f}", f"{kept:.2f}"])
    rows.insert(1, ["---", *["--:"] * 3])
    print(f"{args.model}, gradients of {gradients / 1e6:.1f} MB, 2 ranks, {args.steps} steps\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def work(model: str, mode: str, steps: int, out: Path) -> None:
    """Trains and writes the peak memory of rank 0."""
    import torch
    from models import TASKS

    import hvd_accordion
    import hvd_accordion.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    task = TASKS[model]()
    optimizer = torch.optim.SGD(task.network.parameters(), lr=0.01, momentum=0.9)
    named = task.network.named_parameters()
    compression = MODES[mode](hvd_accordion)
    optimizer = hvd.DistributedOptimizer(optimizer, named, compression=compression, steps_per_epoch=1000)
    for _ in range(steps):
        inputs, targets = task.batch()
        optimizer.zero_grad()
        task.loss(task.network(inputs), targets).backward()
        optimizer.step()
    if hvd.rank() == 0:
        gradients = sum(p.grad.nbytes for p in task.network.parameters())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kept = tensor_bytes(optimizer.state_dict().get("hvd_accordion", {}))
        out.write_text(json.dumps({"peak": peak, "gradients": gradients, "kept": kept}))


def tensor_bytes(state: Any) -> int:
    """Returns the bytes of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(tensor_bytes(x) for x in state.values())
    return getattr(state, "nbytes", 0)


if __name__ == "__main__":
    main()

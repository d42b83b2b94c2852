"""Times the selection of the largest 1 % of 11 M values (a ResNet-18's gradient) on one CPU thread: torch, ours, numpy.

    python examples/benchmarks/selection.py --json build/selection.json

Repeats are interleaved, so that noise affects all alike. Compare the ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hvd_accordion.ops import torch as ops


def candidates(x: torch.Tensor, k: int) -> dict[str, Callable[[], object]]:
    array = x.numpy()
    return {
        "torch.topk": lambda: torch.topk(x.abs(), k, sorted=False),
        "ops.top_k": lambda: ops.top_k(x, k),
        "numpy.argpartition": lambda: np.argpartition(np.abs(array), array.size - k)[array.size - k :],
    }


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}  # the first is a warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=11_000_000)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    x = torch.randn(args.values, generator=torch.Generator().manual_seed(0))
    k = max(1, round(args.ratio * args.values))
    assert set(ops.top_k(x, k).tolist()) == set(torch.topk(x.abs(), k).indices.tolist())
    medians = timed(candidates(x, k), args.repeats)
    ratios = {name: medians["torch.topk"] / ms for name, ms in medians.items()}
    print(f"{k:,} of {args.values:,} fp32 values, one thread, median of {args.repeats}")
    for name, ms in medians.items():
        print(f"{name:20} {ms:8.2f} ms   {ratios[name]:5.1f} times as fast as torch.topk")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"values": args.values, "k": k, "repeats": args.repeats, "ms": medians, "ratio": ratios}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

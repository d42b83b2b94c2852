"""One rank on one host for scaling.py: times Horovod's collectives and whole exchanges, without training.

python scaling_worker.py FILE RATE, RATE in bytes a second (0: unshaped). Rank 0 writes the results to FILE.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import resnet18
from scaling_report import SPECS
from worker import sent_bytes

import hvd_accordion.torch as hvd
from hvd_accordion import CompressionSpec
from hvd_accordion.comm.collectives import AllGather, AllReduce, AllToAll, sent

SIZES = (1_000, 10_000, 100_000, 1_000_000, 8_000_000)
REPEATS = 5
PATIENCE = 3.0  # seconds; collectives that take longer by their bytes are skipped, exchanges are repeated less often


def main(path: str, rate: str) -> None:
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    found: dict[str, Any] = {"collectives": collectives(float(rate))}
    found["exchanges"] = [exchange(spec, float(rate)) for spec in SPECS]
    if not float(rate):
        found["compute"] = compute()
    if hvd.rank() == 0:
        Path(path).write_text(json.dumps(found, indent=1))


def collectives(rate: float) -> list[dict[str, Any]]:
    n, rows = hvd.size(), []
    for kind in (AllReduce, AllGather, AllToAll):
        for size in SIZES:
            payload = torch.zeros(size // (4 * n) * 4 * n, dtype=torch.uint8)
            least = sent(kind, payload.nbytes, n) / rate if rate else 0.0
            if least > PATIENCE:
                continue
            many = max(1, min(20, round(0.1 / (least + 2e-3))))  # back to back, so that the links accumulate no burst
            run = carrier(kind, payload)
            times, wire = timed(lambda run=run, many=many: [run() for _ in range(many)], REPEATS)
            seconds, bytes_ = [t / many for t in times], wire / many
            rows.append({"kind": kind.__name__, "payload": payload.nbytes, "seconds": seconds, "wire": bytes_})
            rows[-1]["sent"] = sent(kind, payload.nbytes, n)
    return rows


def carrier(kind: type, payload: torch.Tensor) -> Callable[[], None]:
    """Sends the payload once and waits like the package's driver."""
    name = f"{kind.__name__}.{payload.nbytes}"
    values = payload.view(torch.float32)
    splits = torch.full((hvd.size(),), payload.nbytes // hvd.size(), dtype=torch.int32)

    def run() -> None:
        if kind is AllReduce:
            handle = hvd.allreduce_async_(values, name=name, op=hvd.Sum)
        elif kind is AllGather:
            handle = hvd.allgather_async(payload, name=name)
        else:
            handle = hvd.alltoall_async(payload, splits=splits, name=name)
        while not hvd.poll(handle):
            time.sleep(1e-4)
        hvd.synchronize(handle)

    return run


def exchange(spec: CompressionSpec, rate: float) -> dict[str, Any]:
    """Exchanges given gradients of a ResNet-18, without forward, backward or hooks."""
    params = dict(resnet18().network.named_parameters())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(params.values(), lr=0.0), params.items(), compression=spec)
    gradients = [torch.randn_like(p) for p in params.values()]

    def refill() -> None:
        for p, gradient in zip(params.values(), gradients, strict=True):
            p.grad = gradient.clone()

    refill()
    optimizer.synchronize()
    expected = sum(row.sent_bytes for row in optimizer.compression_report())
    repeats = min(REPEATS, max(2, math.ceil(PATIENCE * rate / expected))) if rate else REPEATS
    before = optimizer.stats.sent_bytes
    times, wire = timed(optimizer.synchronize, repeats, refill)
    counted = (optimizer.stats.sent_bytes - before) / (repeats + 1)
    return {"spec": str(spec), "seconds": times, "wire": wire, "sent": counted, "predicted": expected}


def compute() -> float:
    """Returns the seconds of forward and backward, without exchange."""
    task = resnet18()

    def step() -> None:
        inputs, targets = task.batch()
        task.loss(task.network(inputs), targets).backward()

    return statistics.median(timed(step, REPEATS)[0])


def timed(run: Callable[[], Any], repeats: int, prepare: Callable[[], Any] = lambda: None) -> tuple[list[float], float]:
    """Returns the seconds of each repeat on the slowest rank, and the mean bytes that left a host per repeat."""
    times, wire = [], 0
    for i in range(repeats + 1):  # the first is a warm-up
        prepare()
        hvd.barrier()
        before, begin = sent_bytes(), time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        hvd.barrier()
        if i:
            times.append(seconds)
            wire += sent_bytes() - before
    both = hvd.allgather(torch.tensor([[*times, wire / repeats]], dtype=torch.float64))
    return both[:, :-1].max(0).values.tolist(), float(both[:, -1].mean())


if __name__ == "__main__":
    main(*sys.argv[1:])

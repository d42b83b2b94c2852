"""One rank of one mode: runs the requested number of steps and returns the time per step and the bytes sent by its host.

python worker.py SOCKET MODEL MODE; started by fleet.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path

import torch
from models import TASKS
from modes import BEFORE, MODES, Mode


def main(path: str, model: str, name: str) -> None:
    with Client(path, family="AF_UNIX") as controller:  # paths are shared by all network namespaces
        try:
            step = training(model, MODES[name.removesuffix(BEFORE)])
        except Exception as error:
            controller.send(f"{type(error).__name__}: {error}")
            raise
        controller.send(os.getpid())
        while steps := controller.recv():
            sent, begin = sent_bytes(), time.perf_counter()
            for _ in range(steps):
                step()
            seconds = time.perf_counter() - begin
            controller.send((seconds / steps, (sent_bytes() - sent) / steps))


def training(model: str, mode: Mode) -> Callable[[], None]:
    """Returns a function that runs one step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if mode.horovod:
        import horovod.torch as hvd

        hvd.init()
    task = TASKS[model]()
    net, optimizer = mode.make(task.network)

    def step() -> None:
        inputs, targets = task.batch()
        optimizer.zero_grad()
        task.loss(net(inputs), targets).backward()
        optimizer.step()

    return step


def sent_bytes() -> int:
    """Returns the bytes that left this host so far, with headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, _, counts = line.partition(":")
        if device.strip() == "eth0":
            return int(counts.split()[8])
    raise RuntimeError("no eth0 here: workers run on the hosts of hosts.py")


if __name__ == "__main__":
    main(*sys.argv[1:])

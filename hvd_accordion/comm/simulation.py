"""A cluster in one process: n exchanges in lock step over numpy arrays, for tests and studies of scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, Request, Rounds, payload, sent

T = TypeVar("T")


def carry_out(requests: Sequence[Request]) -> list[object]:
    """The result of one collective for every rank, from what each rank requests."""
    first = requests[0]
    if any(type(r) is not type(first) for r in requests):
        raise RuntimeError(f"ranks request different collectives: {[type(r).__name__ for r in requests]}")
    n = len(requests)
    if isinstance(first, AllReduce):
        columns = zip(*(payload(r) for r in requests), strict=True)
        means = [np.sum(column, axis=0) / column[0].dtype.type(n) for column in columns]
        return [[m.copy() for m in means] for _ in range(n)]
    if isinstance(first, AllGather):
        rows = np.stack([payload(r)[0] for r in requests])
        return [rows.copy() for _ in range(n)]
    if isinstance(first, AllToAll):
        boxes = np.stack([payload(r)[0] for r in requests])
        return [boxes[:, r].copy() for r in range(n)]
    assert isinstance(first, AllFinite)
    flags = [bool(r.is_finite()) for r in requests if isinstance(r, AllFinite)]
    if len(set(flags)) > 1:
        raise RuntimeError(f"ranks disagree whether the step was finite: {flags}")
    return [np.array(flags[0])] * n


def run(exchanges: Sequence[Rounds[T]]) -> tuple[list[T], float]:
    """Runs one exchange per rank to its end. Returns each rank's result and the bytes that one rank sent."""
    answers: list[object] = [None] * len(exchanges)
    nbytes = 0.0
    while True:
        requests: list[Request] = []
        results: list[T] = []
        for rounds, answer in zip(exchanges, answers, strict=True):
            try:
                requests.append(rounds.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            if requests:
                raise RuntimeError("some ranks ended their exchange while others request a collective")
            return results, nbytes
        nbytes += sum(sent(type(requests[0]), x.nbytes, len(exchanges)) for x in payload(requests[0]))
        answers = carry_out(requests)

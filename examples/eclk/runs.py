"""Runs a method on a problem until the tolerance, on simulated nodes or real ranks."""

from __future__ import annotations

import functools
import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from eclk.methods import Counted, Entry, arguments, on
from eclk.optimum import minimum
from eclk.problems import Problem, Vectors, breast_cancer, mnist, multinomial
from hvd_accordion.optim import factories
from hvd_accordion.optim.simulated import Simulated

CHECK_INTERVAL = 10  # rounds between evaluations of P
PROBLEMS = {
    "breast": functools.partial(breast_cancer, ridge=1e-3),
    "breast-l1": functools.partial(breast_cancer, ridge=1e-3, l1=5e-3, name="breast cancer, L1+L2"),
    "mnist": functools.partial(mnist, ridge=1e-2),
    "mnist-l1": functools.partial(mnist, ridge=1e-2, l1=1e-3, name="MNIST, L1+L2"),
    "multinomial": functools.partial(multinomial, ridge=1e-2),
}
CAPS = {
    "breast": 12_000,
    "breast-l1": 12_000,
    "mnist": 6_000,
    "mnist-l1": 6_000,
    "multinomial": 3_000,
}  # maximal rounds
TOLERANCES = dict.fromkeys(PROBLEMS, 1e-10) | {"multinomial": 1e-6}


@functools.cache
def prepared(name: str, nodes: int, ridge: float | None = None) -> tuple[Problem, float]:
    """Returns the problem and its minimum."""
    problem = PROBLEMS[name](nodes, **({} if ridge is None else {"ridge": ridge}))
    return problem, minimum(problem)[0]


class Cluster(Protocol):
    """Nodes that run a method."""

    def round(self) -> None: ...

    def solution(self) -> Vectors: ...


class SimulatedWorkers(Simulated):
    """`Simulated` as the base of a method's class."""

    def __init__(self, x: Vectors, compression: Any, make: factories.Make, seed: int, size: int) -> None:
        super().__init__(make, x, compression, size, seed)


class InOneProcess:
    """A simulated cluster with one worker for each of the problem's nodes."""

    def __init__(self, entry: Entry, problem: Problem, seed: int) -> None:
        self.simulated = on(entry, SimulatedWorkers)(
            problem.start(), size=problem.nodes, **arguments(entry, problem, seed)
        )
        self.oracles = problem.oracles()

    def round(self) -> None:
        self.simulated.step(self.oracles, self.oracles)

    def solution(self) -> Vectors:
        return self.simulated.solution


@dataclass
class Outcome:
    """The result of a run. `points` holds (round, kilobits that a node has sent, P - P*) at each check."""

    data: str
    method: str
    compressor: str
    shift: str
    settings: dict[str, float]
    label: str
    rounds: int = 0
    kilobits: float = 0.0
    seconds: float = 0.0
    reached: bool = False
    suboptimality: float = math.inf
    points: list[tuple[int, float, float]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "points"}


def follow(
    entry: Entry, problem: Problem, best: float, cluster: Cluster, tolerance: float, cap: int, seed: int
) -> Outcome:
    """Runs until P - P* <= tolerance, at most `cap` rounds. P is evaluated every ten rounds, outside the measured time."""
    shift = entry.shift if entry.method != "EF21" else "-"
    found = Outcome(
        problem.name,
        entry.method,
        str(entry.compression),
        shift.replace("none", "-"),
        dict(entry.settings),
        entry.label,
    )
    counted = on(entry, Counted)(problem.start(), size=problem.nodes, **arguments(entry, problem, seed))
    first = found.suboptimality = problem.value(problem.start()) - best
    found.points.append((0, 0.0, first))
    while found.rounds < cap and not found.reached and found.suboptimality <= 100 * first:  # NaN also ends it
        begin = time.perf_counter()
        cluster.round()
        found.seconds += time.perf_counter() - begin
        found.kilobits += counted.bits(found.rounds) / 1000
        found.rounds += 1
        if found.rounds % CHECK_INTERVAL == 0 or found.rounds == cap:
            found.suboptimality = problem.value(cluster.solution()) - best
            found.points.append((found.rounds, found.kilobits, found.suboptimality))
            found.reached = found.suboptimality <= tolerance
    return found


def simulate(
    entry: Entry, name: str, nodes: int, tolerance: float, cap: int, seed: int = 0, ridge: float | None = None
) -> Outcome:
    problem, best = prepared(name, nodes, ridge)
    return follow(entry, problem, best, InOneProcess(entry, problem, seed), tolerance, cap, seed)


def tune(
    entry: Entry, name: str, nodes: int, tolerance: float, cap: int, seed: int = 0, ridge: float | None = None
) -> Outcome:
    """Returns the setting of the entry's grid with the fewest rounds, then kilobits; if none converges, the closest."""
    best: Outcome | None = None
    for settings in entry.grid:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # many settings of a grid diverge
            found = simulate(entry.tuned(settings), name, nodes, tolerance, cap, seed, ridge)
        if best is None or rank(found) < rank(best):
            best = found
        if best.reached:
            cap = best.rounds
    assert best is not None
    return best


def rank(found: Outcome) -> tuple[float, float]:
    return (found.rounds, found.kilobits) if found.reached else (math.inf, found.suboptimality)

"""The minimum of a problem, with a bound of its error."""

from __future__ import annotations

import math
from itertools import count

import numpy as np

from eclk.problems import Problem, Vectors

CHECK_INTERVAL = 25  # steps between checks of the gap


def minimum(problem: Problem, accuracy: float = 1e-13, limit: int = 200_000) -> tuple[float, Vectors]:
    """Returns P* up to `accuracy`, and its point.

    By accelerated proximal gradient steps (Nesterov 2004, 2.2.20; Beck, Teboulle 2009),

        u+ = prox_{l1/L}(v - grad f(v) / L),   v+ = u+ + b (u+ - u),   b = (sqrt(kappa) - 1) / (sqrt(kappa) + 1)

    until P(x) - P* <= ||s||^2 / (2 ridge) proves it, where s is the smallest subgradient of P. Raises RuntimeError after
    `limit` steps.
    """
    L, root = problem.smoothness, math.sqrt(problem.kappa)
    momentum = (root - 1) / (root + 1)
    u = v = problem.start()
    for step in count():
        if step % CHECK_INTERVAL == 0 and gap(problem, u) <= accuracy:
            return problem.value(u), u
        if step == limit:
            raise RuntimeError(f"{problem.name}: P - P* is not proven to be below {accuracy:g} after {limit} steps")
        slope = mean(problem.gradients(v))
        moved = [soft(x - g / L, problem.l1 / L) for x, g in zip(v, slope, strict=True)]
        v = [new + momentum * (new - old) for new, old in zip(moved, u, strict=True)]
        u = moved


def gap(problem: Problem, x: Vectors) -> float:
    """Returns the bound ||s||^2 / (2 ridge) of P(x) - P*, where s is the smallest subgradient of P at x."""
    squares = 0.0
    for v, g in zip(x, mean(problem.gradients(x)), strict=True):
        s = np.where(v == 0, soft(g, problem.l1), g + problem.l1 * np.sign(v))
        squares += float(np.vdot(s, s))
    return squares / (2 * problem.ridge)


def soft(x: np.ndarray, t: float) -> np.ndarray:
    """Returns sign(x) max(|x| - t, 0), the proximal step of t ||x||_1."""
    return np.sign(x) * np.maximum(np.abs(x) - t, 0) if t else x


def mean(gradients: list[Vectors]) -> Vectors:
    return [sum(parts) / len(gradients) for parts in zip(*gradients, strict=True)]

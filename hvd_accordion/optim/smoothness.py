"""The smoothness constant of an objective that nobody knows it of."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvd_accordion.ops.protocol import Ops
from hvd_accordion.training.vectors import Vectors, each
from hvd_accordion.utils import seeds

TOLERANCE = 1e-3  # relative change from one iteration to the next at which it ends


def estimate(ops: Ops, x: Vectors, gradient: Callable[[Vectors], Vectors], iterations: int, seed: int) -> float:
    """The largest eigenvalue of the Hessian at x, by power iteration on differences of gradients.

    v <- H v / ||H v|| with H v = (grad f(x + r v) - grad f(x - r v)) / (2 r), from below. It is the constant L of f if the
    curvature is largest at x: of a logistic regression at x = 0.

    Args:
        gradient: of f at a point, the mean over the ranks.
        iterations: at most, two gradients each.
    """
    eps = 2.0**-52 if ops.dtype(x[0]) == "float64" else 2.0**-23
    radius = eps ** (1 / 3) * (1 + norm(ops, x))
    v = [ops.reshape(ops.uniform(seeds.stable_hash(seed, i), numel(u), u) - 0.5, u.shape) for i, u in enumerate(x)]
    found = 0.0
    for _ in range(iterations):
        length = norm(ops, v)
        if length == 0 or not math.isfinite(length):
            break
        v = each(lambda u, by=1 / length: u * by, v)
        ahead = gradient(each(lambda x, u: x + radius * u, x, v))
        behind = gradient(each(lambda x, u: x - radius * u, x, v))
        v = each(lambda a, b: (a - b) / (2 * radius), ahead, behind)
        before, found = found, norm(ops, v)
        if abs(found - before) <= TOLERANCE * found:
            break
    return found


def norm(ops: Ops, vectors: Vectors) -> float:
    return math.sqrt(math.fsum(float(ops.sum(ops.reshape(v * v, (-1,)), 0, keepdims=False)) for v in vectors))


def numel(v: object) -> int:
    return math.prod(v.shape)  # type: ignore[attr-defined]

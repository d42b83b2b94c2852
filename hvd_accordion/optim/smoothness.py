"""Estimates the smoothness constant of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvd_accordion.ops.protocol import Ops
from hvd_accordion.training.vectors import Vectors, each
from hvd_accordion.utils import seeds

TOLERANCE = 1e-3  # relative change between iterations at which the estimate has converged


def estimate(ops: Ops, x: Vectors, gradient: Callable[[Vectors], Vectors], iterations: int, seed: int) -> float:
    """Estimates the largest eigenvalue of the Hessian at x, by power iteration on differences of gradients.

    v <- H v / ||H v|| with H v = (grad f(x + r v) - grad f(x - r v)) / (2 r). The estimate approaches the eigenvalue from
    below. It is the constant L of f if the curvature is largest at x, as in a logistic regression at x = 0.

    Args:
        ops: the framework's primitives.
        x: the point.
        gradient: returns the gradient of f at a point, averaged over the ranks.
        iterations: the maximal number of iterations, of two gradients each.
        seed: of the initial v.

    Returns:
        The eigenvalue, 0 for a constant gradient.
    """
    eps = 2.0**-52 if ops.dtype(x[0]) == "float64" else 2.0**-23
    radius = eps ** (1 / 3) * (1 + norm(ops, x))
    v = [ops.reshape(ops.uniform(seeds.stable_hash(seed, i), numel(u), u) - 0.5, u.shape) for i, u in enumerate(x)]
    eigenvalue = 0.0
    for _ in range(iterations):
        length = norm(ops, v)
        if length == 0 or not math.isfinite(length):
            break
        v = each(lambda u, by=1 / length: u * by, v)
        ahead = gradient(each(lambda x, u: x + radius * u, x, v))
        behind = gradient(each(lambda x, u: x - radius * u, x, v))
        v = each(lambda a, b: (a - b) / (2 * radius), ahead, behind)
        previous, eigenvalue = eigenvalue, norm(ops, v)
        if abs(eigenvalue - previous) <= TOLERANCE * eigenvalue:
            break
    return eigenvalue


def norm(ops: Ops, vectors: Vectors) -> float:
    """Returns the 2-norm of all entries."""
    return math.sqrt(math.fsum(float(ops.sum(ops.reshape(v * v, (-1,)), 0, keepdims=False)) for v in vectors))


def numel(v: object) -> int:
    """Returns the number of entries of a tensor."""
    return math.prod(v.shape)  # type: ignore[attr-defined]

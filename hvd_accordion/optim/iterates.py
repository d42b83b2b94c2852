"""Updates of a method's points from the averaged gradient estimate: pure functions over lists of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from hvd_accordion.ops.protocol import Ops
from hvd_accordion.training.vectors import Vectors, each

Points: TypeAlias = dict[str, Vectors]  # all points but x, which the parameters hold


@dataclass(frozen=True)
class Regulariser:
    """psi(x) = l1 ||x||_1 + (l2 / 2) ||x||^2, the part of the objective that the closures leave out."""

    l1: float = 0.0
    l2: float = 0.0

    def prox(self, ops: Ops, points: Vectors, t: float) -> Vectors:
        """Returns argmin_u t psi(u) + ||u - x||^2 / 2 = soft(x, t l1) / (1 + t l2)."""
        if self.l1:
            points = each(lambda x: x - ops.clip(x, -t * self.l1, t * self.l1), points)
        return each(lambda x: x / (1 + t * self.l2), points) if self.l2 else points


@dataclass(frozen=True)
class Katyusha:
    """The update of loopless Katyusha (Kovalev, Horvath, Richtarik 2019, arXiv 1901.08689), as in ECLK (arXiv 2010.00091).

    With eta = theta2 / ((1 + theta2) theta1), sigma = mu / (2 L1) and d = (eta / L1) times the gradient estimate at x:

        z+ = prox_{eta psi / (L1 (1 + eta sigma))} [(eta sigma x + z - d) / (1 + eta sigma)]
        y+ = x + theta1 (z+ - z)
        w+ = y with probability p (the same choice on all ranks), else w
        x+ = theta1 z+ + theta2 w+ + (1 - theta1 - theta2) y+

    Args:
        L1: the smoothness constant assumed by the step sizes, > 0.
        mu: strong convexity of f, >= 0.
        theta1: weight of z, in (0, 1), theta1 + theta2 <= 1.
        theta2: weight of w, in (0, 1).
        psi: the regulariser.
    """

    L1: float
    mu: float
    theta1: float
    theta2: float
    psi: Regulariser = Regulariser()

    solution: ClassVar[str] = "y"  # the point that converges
    remedy: ClassVar[str] = "raise smoothness or smoothness_factor"

    @property
    def eta(self) -> float:
        return self.theta2 / ((1 + self.theta2) * self.theta1)

    @property
    def step(self) -> float:
        """The factor of gradient estimates: eta / L1."""
        return self.eta / self.L1

    def begin(self, x: Vectors) -> Points:
        """Returns the initial points."""
        return {"y": x, "z": x, "w": x}

    def advance(self, ops: Ops, x: Vectors, points: Points, d: Vectors, refresh: bool) -> tuple[Vectors, Points]:
        """Returns x+ and the other points. `refresh`: w moves."""
        eta_sigma = self.eta * self.mu / (2 * self.L1)
        t1, t2 = self.theta1, self.theta2
        z = each(lambda x, z, d: (eta_sigma * x + z - d) / (1 + eta_sigma), x, points["z"], d)
        z = self.psi.prox(ops, z, self.step / (1 + eta_sigma))
        y = each(lambda x, z, old: x + t1 * (z - old), x, z, points["z"])
        w = points["y"] if refresh else points["w"]
        x = each(lambda z, w, y: t1 * z + t2 * w + (1 - t1 - t2) * y, z, w, y)
        return x, {"y": y, "z": z, "w": w}


@dataclass(frozen=True)
class Descent:
    """Proximal descent: x+ = prox_{lr psi} [x - d], and w+ = x with probability p, else w.

    d is lr times the gradient estimate at x.
    """

    lr: float
    psi: Regulariser = Regulariser()

    solution: ClassVar[str] = "x"
    remedy: ClassVar[str] = "lower lr"

    @property
    def step(self) -> float:
        """The factor of gradient estimates: lr."""
        return self.lr

    def begin(self, x: Vectors) -> Points:
        """Returns the initial points."""
        return {"w": x}

    def advance(self, ops: Ops, x: Vectors, points: Points, d: Vectors, refresh: bool) -> tuple[Vectors, Points]:
        """Returns x+ and the other points. `refresh`: w moves."""
        new = self.psi.prox(ops, each(lambda x, d: x - d, x, d), self.lr)
        return new, {"w": x if refresh else points["w"]}

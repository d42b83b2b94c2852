"""What a method sends in a round, and what it makes of the means: ECLK and its siblings in one table of choices."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_accordion.optim.iterates import Descent, Katyusha
from hvd_accordion.training.vectors import Vectors, each
from hvd_accordion.utils import seeds


@dataclass(frozen=True)
class Method:
    """One of the error compensated methods.

    Rank tau's part of the gradient estimate is

        g_tau = grad f_i(x) - grad f_i(w) + grad f^tau(w) - h_tau     (`reduced`; else grad f_i(x) - h_tau)

    and every rank moves by d = mean Q(step g_tau + e_tau) + step h, where h = mean h_tau. The shift h_tau is

        "none"     0
        "refresh"  grad f^tau(w), sent dense whenever w has moved
        "learnt"   h_tau + Q(grad f^tau(w) - h_tau) from round to round (grad f_i(x) where nothing is reduced)

    | method     | iterates | reduced | shift           | feeds back |
    |------------|----------|---------|-----------------|------------|
    | ECLK       | Katyusha | yes     | refresh, learnt | yes        |
    | L-Katyusha | Katyusha | yes     | none            | (dense)    |
    | EC-LSVRG   | Descent  | yes     | refresh, learnt | yes        |
    | L-SVRG     | Descent  | yes     | none            | (dense)    |
    | EC-SGD     | Descent  | no      | none            | yes        |
    | EF21       | Descent  | no      | learnt          | no         |

    Under EF21 (Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203) the estimate is the shift itself.
    """

    name: str
    iterates: Katyusha | Descent
    reduced: bool
    shift: str
    has_residual: bool
    p: float
    seed: int = 0

    def coin(self, step: int) -> bool:
        """Whether w moves at this step: with probability p, from (seed, step), so alike on all ranks."""
        return bool(seeds.at(seeds.stable_hash(self.seed, "coin"), step) < self.p * seeds.PRIME)

    def estimate(self, gx: Vectors, gw: Vectors | None, full: Vectors | None, shift: Vectors | None) -> Vectors:
        """g_tau. Where gw is None, gx is the gradient over all of the rank's data, and grad f_i(w) = grad f^tau(w) = full."""
        if self.reduced and self.shift == "refresh":
            return difference(gx, gw or full)
        if self.reduced and gw is not None:
            gx = each(lambda g, w, f: g - w + f, gx, gw, full or [])
        return difference(gx, shift)

    def direction(self, sent: Vectors | None, h: Vectors | None) -> Vectors:
        """d, from the mean of what the ranks sent under error feedback and the mean of their shifts."""
        gamma = self.iterates.step
        if sent is None:
            return each(lambda h: gamma * h, h or [])
        return sent if h is None else each(lambda s, h: s + gamma * h, sent, h)


def difference(xs: Vectors, ys: Vectors | None) -> Vectors:
    return xs if ys is None else each(lambda x, y: x - y, xs, ys)

"""The gradient estimate of each method: ECLK and its siblings differ only in a table of options."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_accordion.optim.iterates import Descent, Katyusha
from hvd_accordion.training.vectors import Vectors, each
from hvd_accordion.utils import seeds


@dataclass(frozen=True)
class Method:
    """One of the error compensated methods.

    Rank tau's part of the gradient estimate is

        g_tau = grad f_i(x) - grad f_i(w) + grad f^tau(w) - h_tau     (`reduced`, otherwise grad f_i(x) - h_tau)

    and every rank moves by d = mean Q(step g_tau + e_tau) + step h, where h = mean h_tau. The shift h_tau is

        "none"     0
        "refresh"  grad f^tau(w), sent dense whenever w has moved
        "learnt"   h_tau + Q(grad f^tau(w) - h_tau) in each round (grad f_i(x) if not `reduced`)

    | method     | iterates | reduced | shift           | has_residual |
    |------------|----------|---------|-----------------|--------------|
    | ECLK       | Katyusha | yes     | refresh, learnt | yes          |
    | L-Katyusha | Katyusha | yes     | none            | (dense)      |
    | EC-LSVRG   | Descent  | yes     | refresh, learnt | yes          |
    | L-SVRG     | Descent  | yes     | none            | (dense)      |
    | EC-SGD     | Descent  | no      | none            | yes          |
    | EF21       | Descent  | no      | learnt          | no           |

    In EF21 (Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203) the shift itself is the estimate.

    Attributes:
        name: the method's name, for messages.
        iterates: the update of the points.
        reduced: the estimate is variance reduced by gradients at w.
        shift: "none", "refresh" or "learnt".
        has_residual: the estimate is sent under error feedback.
        p: probability that w moves.
        seed: of the coin.
    """

    name: str
    iterates: Katyusha | Descent
    reduced: bool
    shift: str
    has_residual: bool
    p: float
    seed: int = 0

    def coin(self, step: int) -> bool:
        """Returns whether w moves at this step: with probability p, derived from (seed, step), equal on all ranks."""
        return bool(seeds.at(seeds.stable_hash(self.seed, "coin"), step) < self.p * seeds.PRIME)

    def estimate(self, gx: Vectors, gw: Vectors | None, full: Vectors | None, shift: Vectors | None) -> Vectors:
        """Returns g_tau.

        Args:
            gx: grad f_i(x), the gradient of the current sample.
            gw: grad f_i(w), or None if the sample is all of the rank's data. Then it equals `full`.
            full: grad f^tau(w), the gradient over all of the rank's data.
            shift: h_tau.
        """
        if self.reduced and self.shift == "refresh":
            return difference(gx, gw or full)
        if self.reduced and gw is not None:
            gx = each(lambda g, w, f: g - w + f, gx, gw, full or [])
        return difference(gx, shift)

    def direction(self, sent: Vectors | None, h: Vectors | None) -> Vectors:
        """Returns d.

        Args:
            sent: the mean of the ranks' estimates sent under error feedback, or None if none are sent.
            h: the mean of the ranks' shifts, or None if there is none.
        """
        gamma = self.iterates.step
        if sent is None:
            return each(lambda h: gamma * h, h or [])
        return sent if h is None else each(lambda s, h: s + gamma * h, sent, h)


def difference(xs: Vectors, ys: Vectors | None) -> Vectors:
    """Returns x - y for each parameter; None counts as zero."""
    return xs if ys is None else each(lambda x, y: x - y, xs, ys)

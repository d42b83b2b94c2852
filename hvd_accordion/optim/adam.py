"""Adam's arithmetic for one tensor (Kingma, Ba 2015, arXiv 1412.6980; Loshchilov, Hutter 2019, arXiv 1711.05101).

Tensors are numpy's, torch's or TensorFlow's; numbers may be scalar tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvd_accordion.comm.collectives import Tensor
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import validation

TINY = 1e-30  # far below any rate: a share of nothing is 1


@dataclass(frozen=True)
class Adam:
    """One step's numbers, with t the steps so far and this one, n the updates of the second moment so far.

        m     = beta1 m + (1 - beta1) g
        v     = beta2 v + (1 - beta2) g^2
        x     = (1 - lr weight_decay) x - rate m / (sqrt(v / (1 - beta2^n)) + eps),   rate = lr / (1 - beta1^t)

    Weight decay is decoupled, as in AdamW.
    """

    lr: Any
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def rate(self, steps: Any) -> Any:
        """`lr` corrected for a first moment that began at 0; `steps` >= 1."""
        return self.lr / (1 - self.beta1**steps)

    @property
    def decay(self) -> Any:
        """What a step multiplies the parameters with."""
        return 1 - self.lr * self.weight_decay

    def first_moment(self, m: Tensor, g: Tensor) -> Tensor:
        return m * self.beta1 + g * (1 - self.beta1)

    def second_moment(self, v: Tensor, g: Tensor) -> Tensor:
        return v * self.beta2 + g * g * (1 - self.beta2)

    def correction(self, updates: Any) -> Any:
        """What the second moment is divided by, because it began at 0; `updates` >= 1."""
        return 1 - self.beta2**updates

    def moved(self, x: Tensor, m: Tensor, v: Tensor, correction: Any, interval: Interval) -> Tensor:
        """The parameters after the steps of an interval that began at x, whose mean first moment is m."""
        root = (v / correction) ** 0.5
        return x * interval.decay - interval.rate * (m / (root + self.eps))


@dataclass(frozen=True)
class Interval:
    """What the steps since the last exchange amount to: the sum of their rates, and the product of their decays."""

    rate: Any = 0.0
    decay: Any = 1.0

    def extended(self, rate: Any, decay: Any) -> Interval:
        return Interval(self.rate + rate, self.decay * decay)

    def share(self, rate: Any) -> Any:
        """Of the last step, of this rate, in the interval's mean; 1 where all rates are 0."""
        return (rate + TINY) / (self.rate + TINY)


def blended(before: Tensor, m: Tensor, share: Any) -> Tensor:
    """A weighted mean of first moments with one more, of this share in it."""
    return before * (1 - share) + m * share


def masked(ops: Ops, m: Tensor, v: Tensor) -> Tensor:
    """The first moment, 0 where the second is: a weight without gradients must not move by what signs make of 0."""
    return ops.where(v > 0, m, m * 0)


def checked(lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    """The arguments of an Adam; ValueError or TypeError for what is out of range. `lr` may be a tensor or a schedule."""
    if isinstance(lr, int | float):
        validation.real("lr", lr, 0.0, open_low=False)
    beta1, beta2 = betas
    return {
        "lr": lr,
        "betas": (
            validation.real("betas[0]", beta1, 0.0, 1.0, open_low=False, open_high=True),
            validation.real("betas[1]", beta2, 0.0, 1.0, open_low=False, open_high=True),
        ),
        "eps": validation.real("eps", eps, 0.0, open_low=False),
        "weight_decay": validation.real("weight_decay", weight_decay, 0.0, open_low=False),
    }

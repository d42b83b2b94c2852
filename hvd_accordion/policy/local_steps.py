"""LocalSteps: how many steps each rank takes by itself between two exchanges; fixed, or decided by Accordion's rule.

Stich 2018, arXiv 1805.09767; Douillard et al. 2023 (DiLoCo), arXiv 2311.08105. No tensors, no framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_accordion.policy.batch_size import MODEL
from hvd_accordion.policy.critical_regime import Regime, Rule
from hvd_accordion.utils import validation


@dataclass
class AccordionSteps(Rule):
    """How many steps each rank takes by itself, decided by Accordion's rule: few in critical regimes, many elsewhere.

    For `LocalSteps(every=...)`. The rule is `Accordion`'s, on one number for the whole model: ||a(end) - a(start)|| over the
    window, divided by the sum of the learning rates of its steps, where a are the common parameters. Under plain SGD that
    is the norm of the summed averaged gradients. A window's last step ends a round.

    Args:
        critical: steps between two exchanges in the critical regime, >= 1.
        relaxed: the same elsewhere, more than `critical`.
        eta: threshold on the relative change, > 0; higher means less often critical.
        interval: distance of two checks, >= 1.
        unit: what `interval` counts, "epochs" or "steps" (of the optimizer, at least `relaxed` of them).
        lr_drop: a learning rate of at most this share of that at the last check makes the model critical, in (0, 1).
        norm: "sampled" keeps at most 8,192 entries of each layer for the norm, "exact" all.

    Raises ValueError or TypeError for what is out of range.
    """

    critical: int = 5
    relaxed: int = 20
    eta: float = 0.5
    interval: int = 10
    unit: str = "epochs"
    lr_drop: float = 0.5
    norm: str = "sampled"

    def __post_init__(self) -> None:
        self.critical = validation.integer("critical", self.critical, 1)
        self.relaxed = validation.integer("relaxed", self.relaxed, 2)
        if self.relaxed <= self.critical:
            raise ValueError(f"relaxed must be more than critical={self.critical}, got {self.relaxed}")
        self._begin()
        if self.unit == "steps" and self.interval < self.relaxed:
            raise ValueError(f"interval must be at least relaxed={self.relaxed} steps, got {self.interval}")

    def __str__(self) -> str:
        return f"AccordionSteps(critical={self.critical}, relaxed={self.relaxed}, {self._shown()})"

    @property
    def steps(self) -> int:
        """Steps between two exchanges now."""
        return self.critical if self.is_critical else self.relaxed

    @property
    def is_critical(self) -> bool:
        return self.regime(MODEL) == Regime.CRITICAL

    def observe(self, norm: float, lr: float) -> None:
        """The norm of the window that ends now, and the learning rate; the same numbers on every rank."""
        self._decide({MODEL: norm}, lr)


@dataclass
class AutoSteps:
    """As few steps between two exchanges as the link allows: so many that exchanges take `share` of the training's time.

    For `LocalSteps(every=...)`, in torch. Ranks begin with `least` steps, and time some steps and exchanges. Then
    H = ceil(exchange / (share / (1 - share) * step)), between `least` and `most`, by rank 0's numbers, for good.

    Args:
        share: of the time that exchanges may take, in (0, 1).
        least, most: bounds of the steps, 1 <= least < most.

    Raises ValueError or TypeError for what is out of range.
    """

    share: float = 0.05
    least: int = 5
    most: int = 100

    def __post_init__(self) -> None:
        self.share = validation.real("share", self.share, 0.0, 1.0, open_high=True)
        self.least = validation.integer("least", self.least, 1)
        self.most = validation.integer("most", self.most, self.least + 1)

    def choose(self, step: float, exchange: float) -> int:
        """H, from the seconds of a step and of an exchange of the whole model."""
        allowed = self.share / (1 - self.share) * step
        return min(self.most, max(self.least, math.ceil(exchange / allowed) if allowed > 0 else self.most))


@dataclass(frozen=True, eq=False)
class LocalSteps:
    """Every rank steps its own optimizer on its own gradients; the parameters' change is averaged each `every` steps.

    With the common parameters a (the anchor, equal on all ranks) and a rank's own x_r: d_r = a - x_r is compressed with
    error feedback and averaged to d; the outer optimizer applies d to a as a gradient; then x_r = a. Without an outer
    optimizer a becomes a - d, the mean of the ranks' parameters.

    Optimizers over disjoint parameters that are given the same object count the same steps and exchange together.

    Args:
        every: steps between two exchanges, >= 1; or `AccordionSteps`, which decides between few and many; or `AutoSteps`,
            which finds as few as the link allows.
        outer: None for the plain mean, or what makes the outer optimizer of a list of parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)` (DiLoCo's). In Keras a function without
            arguments, such as `functools.partial(keras.optimizers.SGD, 0.7, momentum=0.9, nesterov=True)`.
        fragments: parts of the model, near to equal in size, that are exchanged in turn (Streaming DiLoCo, arXiv
            2501.18512): part k of K at steps that are k `every` / K modulo `every`. At most `every`.
        delay: steps that go on while an exchange is under way, less than `every`. What a rank did meanwhile is added to the
            result, so that nothing is lost. torch alone.
        residual_decay: what the residual is multiplied with before each exchange, in (0, 1]; 1 is error feedback
            (SparseLoCo's beta, arXiv 2508.15706).

    Raises ValueError or TypeError for what is out of range.
    """

    every: int | AccordionSteps | AutoSteps = 20
    outer: Callable[..., Any] | None = None
    fragments: int = 1
    delay: int = 0
    residual_decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.every, AccordionSteps | AutoSteps):
            self._set("every", validation.integer("every", self.every, 1))
        if self.outer is not None and not callable(self.outer):
            raise TypeError(
                "outer must be None or a function that makes an optimizer, such as functools.partial(torch.optim.SGD, "
                f"lr=0.7, momentum=0.9, nesterov=True), got {self.outer!r}"
            )
        self._set("fragments", validation.integer("fragments", self.fragments, 1, self.shortest))
        self._set("delay", validation.integer("delay", self.delay, 0, self.shortest - 1))
        self._set("residual_decay", validation.real("residual_decay", self.residual_decay, 0.0, 1.0))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def shortest(self) -> int:
        """The least number of steps between two exchanges."""
        if isinstance(self.every, int):
            return self.every
        return self.every.critical if isinstance(self.every, AccordionSteps) else self.every.least

    @property
    def rule(self) -> AccordionSteps | None:
        """What decides by norms how many steps there are; None: nothing."""
        return self.every if isinstance(self.every, AccordionSteps) else None

    def described(self) -> dict[str, str]:
        """All in which ranks must agree, as text."""
        outer = "None" if self.outer is None else outer_text(self.outer)
        shared = ("every", "fragments", "delay", "residual_decay")
        return {"local_steps.outer": outer, **{f"local_steps.{name}": repr(getattr(self, name)) for name in shared}}

    def __str__(self) -> str:
        more = {"fragments": 1, "delay": 0, "residual_decay": 1.0}
        shown = [f"every={self.every}", *([] if self.outer is None else [f"outer={outer_text(self.outer)}"])]
        changed = [f"{name}={getattr(self, name)}" for name, default in more.items() if getattr(self, name) != default]
        return f"LocalSteps({', '.join([*shown, *changed])})"


def outer_text(outer: Callable[..., Any]) -> str:
    """The name of what makes an outer optimizer, with the arguments that a functools.partial gives it."""
    function = getattr(outer, "func", outer)
    name = str(getattr(function, "__name__", type(function).__name__))
    given = [*map(repr, getattr(outer, "args", ())), *(f"{k}={v!r}" for k, v in getattr(outer, "keywords", {}).items())]
    return f"{name}({', '.join(given)})" if given else name

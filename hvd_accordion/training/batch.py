"""Batch: of how many steps an update is made, and what that does to the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.batch_size import MODEL, AccordionBatchSize, limits, whole_norm
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.window import Window
from hvd_accordion.training.reports import LayerRecord


class Batch:
    """The size of the batch in one training; without a rule every step is an update.

    Args:
        rule: the user's; a copy decides.
    """

    def __init__(self, rule: AccordionBatchSize | None) -> None:
        self.rule = copy.deepcopy(rule)
        self._initial = self.state_dict()

    @property
    def adapts(self) -> bool:
        return self.rule is not None

    @property
    def window(self) -> Window | None:
        return None if self.rule is None else self.rule.window

    @property
    def needs_epochs(self) -> bool:
        return self.rule is not None and self.rule.needs_epochs

    @property
    def passes(self) -> int:
        """Steps of a full batch."""
        return 1 if self.rule is None else self.rule.passes

    def check(self, world_size: int) -> None:
        """ValueError if the ranks cannot share a small batch evenly."""
        if self.rule is not None:
            self.rule.fits(world_size)

    def lr_scale(self, epoch: int) -> float:
        """What the learning rate is multiplied with for a full batch."""
        return 1.0 if self.rule is None else self.rule.lr_scale(epoch)

    def limits(
        self, step: Any, step_of_epoch: Any, passes: Any, steps_per_epoch: int | None, windows: Iterable[Window]
    ) -> list[Any]:
        """The update to come is made of as many steps as the least of these; counts may be a framework's integers."""
        if self.rule is None:
            return [1]
        intervals = [window.interval for window in windows if window.unit == "steps"]
        return limits(passes, step, step_of_epoch, steps_per_epoch, intervals)

    def sample_size(self, count: int) -> int:
        """How many of a layer's `count` entries the norm of the whole model is made of."""
        return 0 if self.window is None else self.window.sample_size(count)

    def observe_lr(self, lr: float) -> bool:
        return self.rule is not None and self.rule.observe_lr(lr)

    def observe(self, norms: Mapping[str, float], lr: float, epoch: int, layers: Mapping[str, Layer]) -> None:
        """`norms`: of the sampled entries of all layers."""
        if self.rule is not None:
            counts = {name: layers[name].numel for name in norms}
            scaled = (norm * norm_sampling.scale(counts[n], self.sample_size(counts[n])) for n, norm in norms.items())
            self.rule.observe(whole_norm(scaled), lr, epoch)

    def record(self, sent: float) -> LayerRecord | None:
        """What was observed last, for the logger. `sent`: bytes of an exchange of all layers."""
        rule = self.rule
        if rule is None:
            return None
        batches = f"batches of {rule.small * rule.passes}"
        return LayerRecord(
            rule.norms[MODEL], rule.change(MODEL), str(rule.regime(MODEL)), batches, round(sent / rule.passes)
        )

    def metrics(self, epoch: int, updates: int) -> dict[str, float]:
        """What it did in this epoch, for the logger."""
        return {} if self.rule is None else {**self.rule.metrics(epoch), "updates": updates}

    def line(self, epoch: int) -> str:
        """The same in words, for a report."""
        return "" if self.rule is None else self.rule.line(epoch)

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.rule is None else self.rule.state_dict()

    def loaded(self, state: Mapping[str, Any] | None) -> AccordionBatchSize | None:
        """A copy of the rule that has taken up saved state; of None, that of its start."""
        rule, state = copy.deepcopy(self.rule), self._initial if state is None else state
        if rule is not None and state is not None:
            rule.load_state_dict(state)
        return rule

    def take(self, rule: AccordionBatchSize | None) -> None:
        """What `loaded` returned."""
        self.rule = rule

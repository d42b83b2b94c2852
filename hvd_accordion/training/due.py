"""Due: what the controller needs of an engine after an update."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """What `Controller.decide` is to be given after an update.

    Args:
        layers: names of the layers whose norms are due.
        model: whether the norms of all layers are due, which make up that of the whole model.
        lr: whether the learning rate is wanted, norms or not.
        epoch_ended: whether the update was an epoch's last.
    """

    layers: tuple[str, ...] = ()
    model: bool = False
    lr: bool = False
    epoch_ended: bool = False

    def __bool__(self) -> bool:
        return bool(self.layers) or self.model or self.lr or self.epoch_ended

    @property
    def needs_lr(self) -> bool:
        return bool(self.layers) or self.model or self.lr

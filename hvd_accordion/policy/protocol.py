"""Policy: the protocol of whatever chooses a compression for each layer while training goes on.

Names and floats only: a policy sees no tensor and no framework. All ranks give it the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy.window import Window


class Policy(ABC):
    """Base of all policies. A subclass needs `specs` and `choose`; the rest has defaults for a policy that needs no more.

    An optimizer works on a copy of the user's object. Ranks compare `repr(policy)` before they train: it must show the
    settings and no state, as that of a dataclass does.
    """

    # what it needs to know

    window: Window | None = None
    """When it observes norms; None: never."""

    needs_epochs: bool = False
    """Whether `choose` looks at the epoch, so that ends of epochs must be signalled."""

    candidates: tuple[CompressionSpec, ...] = ()
    """Specs whose time is to be measured once, before one of them, or Dense(), is chosen for each layer: see `resolve`."""

    # what it can choose, and what it chooses

    @abstractmethod
    def specs(self, layer: str) -> Sequence[CompressionSpec]:
        """Every spec that `choose` can return for this layer, always in the same order.

        TensorFlow traces an exchange for each of them.
        """

    @abstractmethod
    def choose(self, layer: str, step: int, epoch: int) -> CompressionSpec:
        """The spec of the layer at this step of this epoch (both counted from 0). Equal on all ranks.

        A layer that is 1-D or small, or would not get smaller on the wire, travels dense all the same.
        """

    def next_change(self, step: int) -> int | None:
        """The next step after `step` at which `choose` may return something else; None if no later step changes that.

        Observations and ends of epochs need not be announced.
        """
        del step
        return None

    # what it learns

    def observe(self, norms: Mapping[str, float], lr: float) -> object:  # noqa: B027
        """The norms of the layers' gradients over the window that ends now, and the learning rate."""

    def observe_lr(self, lr: float) -> bool:
        """The learning rate after a window's first update. Returns whether that changes what `choose` returns."""
        del lr
        return False

    def resolve(self, chosen: Mapping[str, CompressionSpec]) -> None:  # noqa: B027
        """Which of the candidates, or Dense(), was found to be fastest for each layer; replaces earlier findings."""

    # what it shows and saves

    def regime(self, layer: str) -> str | None:
        """A word for reports: how the layer is treated now. None shows as "-"."""
        del layer
        return None

    def change(self, layer: str) -> float | None:
        """The relative change of the layer's norm at the last observation, for reports; None if unknown."""
        del layer
        return None

    def settings(self) -> dict[str, object]:
        """Parameters of the run for the logger."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in terms of JSON. A dict has one entry for each layer; other values are of all layers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Takes up what `state_dict` returned."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True, repr=False)
class Fixed(Policy):
    """One spec for ever: what a spec alone stands for."""

    spec: CompressionSpec

    def __repr__(self) -> str:
        return repr(self.spec)

    def __str__(self) -> str:
        return str(self.spec)

    def specs(self, layer: str) -> Sequence[CompressionSpec]:
        del layer
        return (self.spec,)

    def choose(self, layer: str, step: int, epoch: int) -> CompressionSpec:
        del layer, step, epoch
        return self.spec


def is_policy(value: Any) -> bool:
    return isinstance(value, CompressionSpec | Policy)


def policy_of(value: CompressionSpec | Policy) -> Policy:
    """The policy itself; `Fixed` of a spec."""
    return Fixed(value) if isinstance(value, CompressionSpec) else value

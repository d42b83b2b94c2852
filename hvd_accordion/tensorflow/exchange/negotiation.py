"""Before the first exchange of some layers: settings are compared, and the kinds of their gradients agreed on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.tensorflow.exchange.agreement import largest, require_equal
from hvd_accordion.tensorflow.exchange.planning import Kind, Plan, kind_of
from hvd_accordion.tensorflow.transport import HorovodTransport

Names = tuple[str, ...]


class Negotiation:
    """What ranks have agreed on, by the names of the layers that are exchanged together.

    Args:
        prefix: of all names of collectives.
    """

    def __init__(self, plan: Plan, transport: HorovodTransport, prefix: Prefix) -> None:
        self.plan, self.transport, self.prefix = plan, transport, prefix
        self._count = itertools.count()
        self._numbers: dict[Names, int] = {}

    def clear(self) -> None:
        """Ranks were gathered anew: nothing is agreed on."""
        self._count = itertools.count()
        self._numbers.clear()

    @property
    def begun(self) -> bool:
        """Whether anything was agreed on, so that graphs may have been traced."""
        return bool(self._numbers)

    def number(self, names: Names) -> int:
        """Of an exchange that was agreed on: part of the names of its collectives."""
        return self._numbers[names]

    def is_due(self, names: Names, grads: Sequence[Any]) -> bool:
        """Whether the layers are new, or a gradient appears that no rank had: on all ranks at the same step."""
        kinds = self.plan.kinds
        pairs = zip(names, grads, strict=True)
        new = any(kinds.get(name, Kind.NONE) == Kind.NONE and g is not None for name, g in pairs)
        return new or names not in self._numbers

    def agree(
        self,
        names: Names,
        grads: Sequence[Any],
        described: dict[str, str],
        undecided: Callable[[], bool],
        traced: bool,
    ) -> bool:
        """Returns whether an Auto must choose now, on all ranks.

        Args:
            described: the settings that must be equal on all ranks.
            undecided: whether an Auto's choice is missing here; called when settings have been compared.
            traced: the caller is a graph that has no place for a mean where this rank has no gradient.

        Raises ValueError, on all ranks alike, where settings differ, or a graph has no place for a mean.
        """
        number = next(self._count)
        name = f"{self.prefix}.{number}"
        require_equal({**described, "exchanged": ", ".join(names)}, name, self.transport)
        mine = [int(kind_of(g, self.plan.settings.sparse_as_dense)) for g in grads]
        lacking = [int(traced and kind == Kind.NONE) for kind in mine]
        numbers = largest([*mine, *lacking, int(undecided())], f"{name}.kinds", self.transport)
        for layer, kind, lacks in zip(names, numbers, numbers[len(names) : -1], strict=False):
            if kind != Kind.NONE and lacks:
                raise ValueError(
                    f"the gradient of {layer} is missing on some ranks but not on all: in elastic training, inside of "
                    "tf.function, all ranks must have the same gradients"
                )
            self.plan.kinds[layer] = max(Kind(kind), self.plan.kinds.get(layer, Kind.NONE))
        self._numbers[names] = number
        return bool(numbers[-1])

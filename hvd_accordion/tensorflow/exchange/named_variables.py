"""The variables whose gradients an exchange averages, under names that are equal on all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from hvd_accordion.tensorflow.exchange.variables import value_of


class NamedVariables:
    """Names of variables, by the identity of the tf.Variable; holds weak references only.

    Attributes:
        local: identities of those whose gradients stay the rank's own.
    """

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[Any], str]] = {}
        self.local: set[int] = set()

    def add(self, names: Sequence[str], variables: Sequence[Any]) -> None:
        for name, variable in zip(names, map(value_of, variables), strict=True):
            self._names[id(variable)] = weakref.ref(variable), name

    def name(self, variable: Any) -> str | None:
        value = value_of(variable)
        found = self._names.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def names(self) -> list[str]:
        return [name for _, name in self._names.values()]

    def local_names(self) -> frozenset[str]:
        return frozenset(name for key, (_, name) in self._names.items() if key in self.local)

    def is_local(self, variable: Any) -> bool:
        return id(value_of(variable)) in self.local

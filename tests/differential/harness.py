"""User scripts as data, and what they are run with. No framework is imported here.

A script is a function of `hvd` that trains as a user of Horovod would, with nothing of this package in it, and returns
what it trained. `hvd` is Horovod's module or ours; what it adds to `DistributedOptimizer` is the mode's compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from hvd_accordion import Accordion, Dense, PowerSGD, TopK

EXACT = {"none": None, "dense": Dense()}
LOSSY = {
    "powersgd": PowerSGD(2),
    "topk": TopK(0.1),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=TopK(0.1), interval=2, unit="steps"),
}


@dataclass(frozen=True)
class Script:
    """A user's script.

    Args:
        tolerance: of the exact modes.
        conserves: whether all that was given must be applied or wait in a residual.
        horovod_fails: why Horovod's own optimizer can't run it; the reference is then an average by hand.
    """

    name: str
    train: Callable[[Any], Any]
    tolerance: float = 1e-6
    conserves: bool = True
    horovod_fails: str = ""


def register(scripts: dict[str, Script]) -> Callable[..., Any]:
    """The decorator that adds a function to `scripts`."""

    def script(function: Any = None, **options: Any) -> Any:
        def add(function: Any) -> Any:
            assert function.__name__ not in scripts, f"two scripts are called {function.__name__}"
            scripts[function.__name__] = Script(function.__name__, function, **options)
            return function

        return add if function is None else add(function)

    return script


@dataclass
class Horovod:
    """A module of Horovod's names, whose factories of distributed objects get `options` where the script gives none."""

    module: ModuleType
    options: dict[str, Any] = field(default_factory=dict)
    factories: tuple[str, ...] = ("DistributedOptimizer", "DistributedGradientTape")

    def __getattr__(self, name: str) -> Any:
        theirs = getattr(self.module, name)
        if name not in self.factories:
            return theirs
        return lambda *args, **given: theirs(*args, **{**self.options, **given})

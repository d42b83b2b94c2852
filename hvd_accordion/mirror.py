"""Modules of this package that have all that a module of Horovod has."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


def mirror(theirs: ModuleType, ours: dict[str, Any]) -> list[str]:
    """Puts every public name of `theirs` into the namespace of a package, and returns them.

    Its submodules are found under our name too ("import hvd_accordion.torch.elastic"), but where we have one of our own.
    """
    package = ours["__name__"]
    for name, module in list(sys.modules.items()):
        if name.startswith(theirs.__name__ + "."):
            alias = name.replace(theirs.__name__, package, 1)
            child = ".".join(alias.split(".")[: package.count(".") + 2])
            if PathFinder.find_spec(child, ours["__path__"]) is None:
                sys.modules.setdefault(alias, module)
    names = [name for name in dir(theirs) if not name.startswith("_")]
    ours.update((name, getattr(theirs, name)) for name in names)
    return names

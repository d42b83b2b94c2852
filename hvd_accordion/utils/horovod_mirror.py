"""Lets modules of this package offer every name of a Horovod module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def mirror(theirs: ModuleType, ours: dict[str, Any]) -> list[str]:
    """Copies every public name of `theirs` into a package's namespace, except names of its own modules. Returns the names.

    Submodules can be imported under our name too: "import hvd_accordion.torch.elastic".
    """
    package, path = ours["__name__"], ours["__path__"]
    _FINDER.mirrored[package] = theirs.__name__, list(path)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # before the one that would load their files a second time, under our name
    names = [name for name in dir(theirs) if not name.startswith("_")]
    for name in names:
        if PathFinder.find_spec(f"{package}.{name}", path) is None:
            ours[name] = getattr(theirs, name)
        elif name in ours and ours[name] is getattr(theirs, name):  # "from theirs import *" brings it along
            del ours[name]
    return names


class _Finder(MetaPathFinder, Loader):
    """Finds submodules of Horovod under the names of the mirroring packages: the same modules, not copies."""

    def __init__(self) -> None:
        self.mirrored: dict[str, tuple[str, list[str]]] = {}  # our package -> theirs, our package's search path

    def _theirs(self, fullname: str) -> str | None:
        """Horovod's name of a module; None if Horovod has no such module, or this package replaces it."""
        for package in sorted(self.mirrored, key=len, reverse=True):
            if fullname.startswith(package + "."):
                theirs, path = self.mirrored[package]
                tail = fullname[len(package) + 1 :]
                own = PathFinder.find_spec(f"{package}.{tail.split('.')[0]}", path)
                return f"{theirs}.{tail}" if own is None else None
        return None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        real = self._theirs(fullname)
        if real is None or (real not in sys.modules and importlib.util.find_spec(real) is None):
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        real = self._theirs(spec.name)
        assert real is not None
        module = importlib.import_module(real)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # type: ignore[union-attr]  # importing has put ours in its place


_FINDER = _Finder()

"""The public names of Horovod's modules, and a table of calls that shows of each that it works here, or how it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "horovod_names.md"
Call = Callable[[Any], Any]  # of our module; what it returns must be true


@dataclass(frozen=True)
class Refused:
    """`call` raises this error, whose text matches."""

    error: type[Exception]
    match: str
    call: Call


def public(module: ModuleType) -> tuple[set[str], set[str]]:
    """Names that a module of Horovod offers, and its submodules; what it has imported from others is neither."""
    names, submodules = set(), set()
    for name in dir(module):
        value = getattr(module, name)
        if name.startswith("_"):
            continue
        if not isinstance(value, ModuleType):
            names.add(name)
        elif value.__name__.startswith("horovod."):
            submodules.add(name)
    return names, submodules


def differences(module: str, table: Mapping[str, Any], submodules: set[str]) -> str:
    """What stands in Horovod's module and not in the table, or the other way round; empty if all is well."""
    names, its = public(importlib.import_module(module))
    told = []
    for what, found, known in (("names", names, set(table)), ("submodules", its, submodules)):
        told += [f"{module} has new {what}, without a row: {sorted(found - known)}"] if found - known else []
        if what == "names" and known - found:  # submodules are there when somebody has imported them
            told.append(f"{module} has no more {what}: {sorted(known - found)}")
    return "; ".join(told)


def missing_from_page(module: str) -> list[str]:
    """Names and submodules that the section of a module on the page of the docs does not have."""
    section = PAGE.read_text().split(f"\n## {module}\n")[1].split("\n## ")[0]
    return sorted(
        name for part in public(importlib.import_module(module)) for name in part if f"`{name}`" not in section
    )


def left_out(submodule: str) -> list[str]:
    """Classes and functions of Horovod's `elastic` that the one under our name lacks; they have tests of their own.

    Other submodules are Horovod's inside, under our name or replaced.
    """
    theirs, ours = (importlib.import_module(f"{package}.{submodule}") for package in ("horovod", "hvd_accordion"))
    offered = public(theirs)[0] if submodule.endswith("elastic") else set()
    own = {n for n in offered if ".elastic" in getattr(getattr(theirs, n), "__module__", "")}
    return sorted(n for n in own if not hasattr(ours, n))


def check(row: Call | Refused, ours: Any) -> None:
    if isinstance(row, Refused):
        with pytest.raises(row.error, match=row.match):
            row.call(ours)
    else:
        assert row(ours)

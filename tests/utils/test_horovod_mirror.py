"""Modules that have all that another has."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from hvd_accordion.utils.horovod_mirror import mirror

THEIRS = {
    "theirs_of_test": {"answer": 42, "_private": 1, "function": len, "part": None, "replaced": None},
    "theirs_of_test.part": {"x": 1, "__path__": []},
    "theirs_of_test.part.inner": {"y": 2},
    "theirs_of_test.replaced": {},
    "theirs_of_test.replaced.inner": {},
    "theirs_of_test_too": {},  # not a part of it, though its name begins so
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`theirs`, as if it were imported, and the names of a package `ours` that has a submodule `replaced` of its own."""
    for name, names in THEIRS.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "replaced.py").write_text("")
    ours = ModuleType("ours_of_test")
    ours.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "ours_of_test", ours)
    yield SimpleNamespace(theirs=sys.modules["theirs_of_test"], ours=ours)
    for name in [name for name in sys.modules if name.startswith("ours_of_test.")]:
        del sys.modules[name]


def test_every_public_name_is_there_and_told(packages):
    assert mirror(packages.theirs, vars(packages.ours)) == ["answer", "function", "part", "replaced"]
    assert packages.ours.answer == 42 and packages.ours.function is len
    assert not hasattr(packages.ours, "_private") and packages.ours.__name__ == "ours_of_test"


def test_their_submodules_are_found_under_our_name(packages):
    mirror(packages.theirs, vars(packages.ours))
    assert import_module("ours_of_test.part") is sys.modules["theirs_of_test.part"]
    assert import_module("ours_of_test.part.inner") is sys.modules["theirs_of_test.part.inner"]
    aliases = {name for name in sys.modules if name.startswith("ours_of_test")}
    assert aliases == {"ours_of_test", "ours_of_test.part", "ours_of_test.part.inner"}


def test_a_submodule_of_our_own_stays_ours_with_all_below_it(packages):
    mirror(packages.theirs, vars(packages.ours))
    assert import_module("ours_of_test.replaced").__file__.endswith("replaced.py")
    with pytest.raises(ModuleNotFoundError):
        import_module("ours_of_test.replaced.inner")


def test_what_was_imported_under_our_name_before_stays(packages, monkeypatch):
    before = ModuleType("ours_of_test.part")
    monkeypatch.setitem(sys.modules, "ours_of_test.part", before)
    mirror(packages.theirs, vars(packages.ours))
    assert sys.modules["ours_of_test.part"] is before

"""The examples' own folders on the path, as they are when one of them runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def program(path: Path) -> Iterator[ModuleType]:
    """A program of the examples, with its folder on the path; afterwards the path is as before."""
    for name in ("torch", "matplotlib", "mlxtend", "tqdm"):
        pytest.importorskip(name)
    before = sys.path[:]
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_program", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="session")
def paper() -> Iterator[ModuleType]:
    """The program accordion_paper.py; its parts are modules of the package accordion_paper."""
    yield from program(EXAMPLES / "pytorch" / "accordion_paper.py")


@pytest.fixture(scope="session")
def demo() -> Iterator[ModuleType]:
    """The program demo.py."""
    yield from program(EXAMPLES / "demo.py")


@pytest.fixture(scope="session")
def transformer_lm() -> Iterator[ModuleType]:
    """The program transformer_lm.py of torch."""
    yield from program(EXAMPLES / "pytorch" / "transformer_lm.py")

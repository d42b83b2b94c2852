"""The examples' own folder on the path, as it is when one of them runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pytorch"


@pytest.fixture(scope="session")
def paper() -> Iterator[ModuleType]:
    """The program accordion_paper.py; its parts are modules of the package accordion_paper."""
    for name in ("torch", "matplotlib", "mlxtend", "tqdm"):
        pytest.importorskip(name)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("accordion_paper_program", FOLDER / "accordion_paper.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    sys.path.remove(str(module.ROOT / "examples"))

"""What mypy makes of users' scripts (tests/types), and the types that Horovod's names have here."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hvd_accordion"
HELPERS = set(  # Horovod's own, which it does not hide
    "LocalGradientAggregationHelper check_num_rank_power_of_2 gpu_available handle_average_backwards_compatibility "
    "is_version_greater_equal_than refs_to_vars split_list vars_to_refs".split()
)
BASICS = PACKAGE / "utils" / "horovod_basics.pyi"


def test_scripts_of_users_and_the_ops_modules_pass_mypy():
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", "tests/types"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def declared(stub: Path) -> dict[str, ast.AST]:
    """Names that a stub gives types."""
    names: dict[str, ast.AST] = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname: node for alias in node.names if alias.asname}
    return names


@pytest.mark.parametrize("name", ["torch", "tensorflow", "tensorflow.keras", "keras"])
def test_every_public_name_has_a_type_and_its_own_arguments(name):
    pytest.importorskip(name.split(".")[0])
    module, names = import_module(f"hvd_accordion.{name}"), declared(BASICS)
    names |= declared(PACKAGE / Path(*name.split(".")) / "__init__.pyi")
    public = [n for n in module.__all__ if callable(getattr(module, n)) and not inspect.ismodule(getattr(module, n))]
    assert len(public) > 20
    assert sorted(set(public) - set(names) - HELPERS) == []
    for public_name in public:
        node = names.get(public_name)
        if isinstance(node, ast.FunctionDef) and public_name != "shutdown":  # Horovod's takes anything
            arguments = [a.arg for a in node.args.posonlyargs + node.args.args]
            theirs = inspect.signature(getattr(module, public_name)).parameters.values()
            assert arguments == [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD], public_name

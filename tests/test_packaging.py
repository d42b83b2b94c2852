"""The source archive and the wheel: built, checked, and installed where there is nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hvd_accordion

ROOT = Path(__file__).resolve().parent.parent
VERSION = hvd_accordion.__version__
NOT_SOURCES = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "mlruns",
    "mlflow.db",
)
FRAMEWORKS = ("torch", "tensorflow", "horovod", "numpy", "mlflow")


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **options)


def output(*command: object) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """Built from a copy of the sources: nothing is written beside them."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "sources")
    return {path.suffix: path for path in (folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def elsewhere(archives, tmp_path_factory) -> Path:
    """bin/ of an environment with this package in it and nothing else, not even pip."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    output(*pip, "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", archives[".whl"])
    return folder / "bin"


def package_files() -> set[str]:
    return {
        str(p.relative_to(ROOT))
        for p in (ROOT / "hvd_accordion").rglob("*")
        if p.suffix in (".py", ".pyi") or p.name == "py.typed"
    }


def test_the_archives_pass_twines_check(archives):
    assert set(archives) == {".gz", ".whl"}
    assert output(sys.executable, "-m", "twine", "check", "--strict", *archives.values()).count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[".whl"]) as wheel:
        names = set(wheel.namelist())
    info = f"hvd_accordion-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert {f"{info}{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")} <= names


def test_the_source_archive_holds_what_builds_and_tests_it(archives):
    with tarfile.open(archives[".gz"]) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    assert package_files() <= names
    wanted = (
        "CHANGELOG.md CITATION.cff LICENSE Makefile README.md setup.cfg pyproject.toml docker/setup.sh examples/demo.py"
    )
    assert {*wanted.split(), "tests/test_packaging.py", "tests/parallel/launcher.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".db")) or "mlruns" in name or name.startswith(".")]


def test_metadata(archives):
    with zipfile.ZipFile(archives[".whl"]) as wheel:
        found = Parser().parsestr(wheel.read(f"hvd_accordion-{VERSION}.dist-info/METADATA").decode())
    assert found["Version"] == VERSION and found["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (found["License"], found["License-Expression"])
    assert found["Summary"] and found["Author"] and found["Keywords"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert {"torch", "tensorflow", "mlflow", "examples", "test"} <= set(found.get_all("Provides-Extra"))
    assert all("extra ==" in line for line in found.get_all("Requires-Dist"))  # by itself it needs nothing


def test_the_wheel_imports_where_there_is_no_framework(elsewhere):
    code = f"""
import importlib.util, hvd_accordion
assert not [name for name in {FRAMEWORKS} if importlib.util.find_spec(name)]
print(hvd_accordion.__version__, hvd_accordion.__file__, hvd_accordion.Accordion(), hvd_accordion.PowerSGD(4).delta((8, 8)))
"""
    version, file, *_ = output(elsewhere / "python", "-I", "-c", code).split()
    assert version == VERSION and Path(file).is_relative_to(elsewhere.parent)


def test_the_command_line_works_there(elsewhere):
    shown = output(elsewhere / "hvd-accordion", "--help")
    assert "check" in shown and "report" in shown
    assert shown == output(elsewhere / "python", "-I", "-m", "hvd_accordion", "--help")
    assert output(elsewhere / "hvd-accordion", "--version").split() == ["hvd_accordion", VERSION]


def test_there_a_check_tells_what_is_missing_and_a_report_what_it_needs(elsewhere):
    checked = run(elsewhere / "hvd-accordion", "check")
    assert checked.returncode == 1 and not checked.stderr, checked.stderr
    broken = [line.split()[1] for line in checked.stdout.splitlines() if line.startswith("broken")]
    assert broken == ["Horovod", "framework"]
    ranks = run(elsewhere / "hvd-accordion", "check", env={"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"})
    assert ranks.returncode == 1 and "not measured: torch and horovod not installed" in ranks.stdout, ranks.stderr
    reported = run(elsewhere / "hvd-accordion", "report", "x")
    assert reported.returncode == 2 and "pip install hvd_accordion[mlflow]" in reported.stderr


def test_the_version_is_semantic_and_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?(\+[\w.]+)?", VERSION)
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released and released[1] == VERSION


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")

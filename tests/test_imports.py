"""What importing the package brings along, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

import hvd_accordion

needs_torch = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("horovod") is None, reason="needs torch and horovod"
)


HEAVY = {"torch", "tensorflow", "keras", "horovod", "mlflow", "numpy", "matplotlib", "scipy"}


def in_a_fresh_process(code: str):
    """What the code prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported_with(module: str) -> set[str]:
    """Top-level names of all modules that are there after the import."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    return set(in_a_fresh_process(code))


def test_the_package_imports_no_framework():
    assert not imported_with("hvd_accordion") & HEAVY


@pytest.mark.parametrize(
    "module", ["plan", "controller", "report", "collectives", "compression", "tracking", "ops.protocol"]
)
def test_nor_does_the_framework_free_part(module):
    assert not imported_with(f"hvd_accordion.{module}") & HEAVY


@needs_torch
def test_torch_does_not_bring_tensorflow():
    names = imported_with("hvd_accordion.torch")
    assert "torch" in names and not names & {"tensorflow", "keras", "mlflow", "matplotlib"}


def test_public_names():
    promised = "Accordion Dense FP16 BF16 TopK RandomK QSGD PowerSGD MLflowLogger".split()
    assert set(promised) <= set(hvd_accordion.__all__)
    assert all(hasattr(hvd_accordion, name) for name in hvd_accordion.__all__)


@needs_torch
def test_every_public_name_of_horovod_torch_is_there():
    code = """
import json
import horovod.torch as theirs, hvd_accordion.torch as ours
names = [name for name in dir(theirs) if not name.startswith("_")]
missing = [name for name in names if not hasattr(ours, name)]
changed = [name for name in names if name not in missing and getattr(ours, name) is not getattr(theirs, name)]
unlisted = [name for name in names if name not in ours.__all__]
print(json.dumps([len(names), missing, unlisted, changed]))
"""
    count, missing, unlisted, changed = in_a_fresh_process(code)
    assert count > 50 and not missing and not unlisted
    assert set(changed) == {"DistributedOptimizer", "broadcast_optimizer_state"}


@needs_torch
def test_every_submodule_of_horovod_torch_is_there():
    code = """
import importlib, json, pkgutil
import horovod.torch as theirs
import hvd_accordion.torch as ours
wrong = []
found = [m.name for m in pkgutil.walk_packages(theirs.__path__, "horovod.torch.") if not m.name.endswith(".mpi_lib_v2")]
for name in found:
    tail = name.removeprefix("horovod.torch.")
    try:
        same = importlib.import_module(f"hvd_accordion.torch.{tail}") is importlib.import_module(name)
    except ImportError as error:
        same = str(error)
    if same is not True:
        wrong.append((tail, same))
print(json.dumps([found, wrong]))
"""
    found, wrong = in_a_fresh_process(code)
    assert {"horovod.torch.elastic", "horovod.torch.elastic.sampler", "horovod.torch.mpi_ops"} <= set(found)
    assert not wrong


@needs_torch
def test_the_ways_in_which_scripts_import_it():
    code = """
import json
import hvd_accordion.torch as hvd
import hvd_accordion.torch.elastic
from hvd_accordion.torch.compression import Compression
from hvd_accordion.torch import *
from hvd_accordion.torch import elastic
same = hvd.Compression is Compression, hvd.elastic is elastic, DistributedOptimizer is hvd.DistributedOptimizer
print(json.dumps(same))
"""
    assert in_a_fresh_process(code) == [True, True, True]

"""What importing the package brings along, each in a fresh process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hvd_accordion

needs_torch = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("horovod") is None, reason="needs torch and horovod"
)
needs_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is None or find_spec("horovod") is None, reason="needs tensorflow and horovod"
)
# ours in place of horovod's, by the name after "horovod."
REPLACED = {
    "tensorflow": {
        "DistributedGradientTape",
        "SyncBatchNormalization",
        "join",
        "sync_batch_norm",
        "DistributedOptimizer",
        "PartialDistributedGradientTape",
        "broadcast_global_variables",
        "broadcast_object_fn",
        "broadcast_variables",
        "elastic",
        "init",
    },
    "tensorflow.keras": {
        "DistributedOptimizer",
        "broadcast_global_variables",
        "callbacks",
        "elastic",
        "init",
        "load_model",
    },
    "keras": {
        "DistributedOptimizer",
        "PartialDistributedOptimizer",
        "broadcast_global_variables",
        "callbacks",
        "elastic",
        "init",
        "load_model",
    },
}
METHODS = {"ECLK", "ECLSVRG", "ECSGD", "EF21", "LKatyusha", "LSVRG", "estimate_smoothness"}
ADAMS = {"OneBitAdam", "ZeroOneAdam"}
ADDED = {
    "tensorflow": {"GradientExchange", *METHODS},
    "tensorflow.keras": {"PartialDistributedOptimizer", *ADAMS},
    "keras": ADAMS,
}

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
    "module",
    (
        "comm.collectives comm.agreement comm.naming comm.launch comm.transport ops.protocol compression policy.assignment "
        "policy.batch_size "
        "training.controller training.settings training.reports tracking.mlflow_logger optim.methods optim.training cli "
        "utils.horovod_mirror utils.seeds"
    ).split(),
)
def test_nor_does_the_framework_free_part(module):
    assert not imported_with(f"hvd_accordion.{module}") & HEAVY


@needs_torch
def test_torch_does_not_bring_tensorflow():
    names = imported_with("hvd_accordion.torch")
    assert "torch" in names and not names & {"tensorflow", "keras", "mlflow", "matplotlib"}


def test_public_names():
    promised = (
        "Accordion AccordionBatchSize Auto Dense FP16 BF16 TopK RandomK QSGD EFSignSGD PowerSGD MLflowLogger".split()
    )
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
added = [name for name in ours.__all__ if name not in names]
print(json.dumps([len(names), missing, unlisted, changed, added]))
"""
    count, missing, unlisted, changed, added = in_a_fresh_process(code)
    assert count > 50 and not missing and not unlisted
    ours = {"DistributedOptimizer", "broadcast_optimizer_state", "elastic", "init", "join"}
    assert set(changed) == ours and set(added) == {"GradientExchange", *ADAMS, *METHODS}


@pytest.mark.parametrize(
    ("framework", "mirrors", "takeover"),
    [
        ("torch", {"__init__.py", "elastic/__init__.py", "elastic/state.py"}, {"horovod_takeover.py"}),
        (
            "tensorflow",
            {"__init__.py", "elastic.py", "keras/__init__.py", "keras/callbacks.py", "keras/elastic.py"},
            set(),
        ),
    ],
)
def test_few_modules_of_a_front_end_name_horovod(framework, mirrors, takeover):
    """The mirrors, the transport, and what takes Horovod's own optimizer over; all others hold a Transport."""
    root = Path(hvd_accordion.__file__).parent / framework
    imports = re.compile(r"^\s*(import|from) horovod\b", re.MULTILINE)
    naming = {str(path.relative_to(root)) for path in root.rglob("*.py") if imports.search(path.read_text())}
    assert naming == {*mirrors, *takeover, "transport.py"}


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
        ours, theirs = importlib.import_module(f"hvd_accordion.torch.{tail}"), importlib.import_module(name)
        made = [n for n, x in vars(theirs).items() if getattr(x, "__module__", "") == name and not n.startswith("_")]
        lacks = [n for n in made if not hasattr(ours, n)]
        same = ours is theirs or (ours.__name__ if ours.TorchState is not theirs.TorchState and not lacks else lacks)
    except ImportError as error:
        same = str(error)
    if same is not True:
        wrong.append((tail, same))
print(json.dumps([found, wrong]))
"""
    found, wrong = in_a_fresh_process(code)
    assert {"horovod.torch.elastic", "horovod.torch.elastic.sampler", "horovod.torch.mpi_ops"} <= set(found)
    assert wrong == [["elastic", "hvd_accordion.torch.elastic"], ["elastic.state", "hvd_accordion.torch.elastic.state"]]


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


# TensorFlow: it takes seconds to import, so one process looks at everything


@pytest.fixture(scope="module")
def under_tensorflow():
    """module -> what is to be said of it; None -> top-level names of all modules that are there in the end."""
    code = f"""
import importlib, json, pkgutil, sys
modules, found = {list(REPLACED)}, {{}}
for module in modules:
    theirs = importlib.import_module("horovod." + module)
    if module != "tensorflow":
        importlib.import_module("horovod." + module + ".callbacks")
    names = [name for name in dir(theirs) if not name.startswith("_")]
    ours = importlib.import_module("hvd_accordion." + module)
    there = [name for name in names if hasattr(ours, name)]
    found[module] = {{
        "names": names,
        "missing": [name for name in names if name not in there],
        "unlisted": [name for name in names if name not in ours.__all__],
        "listed in vain": [name for name in ours.__all__ if not hasattr(ours, name)],
        "replaced": [name for name in there if getattr(ours, name) is not getattr(theirs, name)],
        "added": [name for name in ours.__all__ if name not in names],
    }}
found[None] = [name.split(".")[0] for name in sys.modules]
for module in modules:
    theirs = importlib.import_module("horovod." + module)
    found[module]["submodules"] = submodules = {{}}
    for name in (m.name for m in pkgutil.walk_packages(theirs.__path__, "horovod." + module + ".")):
        if not name.endswith(".mpi_lib"):  # no module, but a library of operations
            try:
                ours = importlib.import_module(name.replace("horovod.", "hvd_accordion.", 1))
                submodules[name] = "the same" if ours is importlib.import_module(name) else "ours"
            except ImportError as error:
                submodules[name] = str(error)
for module in modules[1:]:
    theirs, ours = (importlib.import_module(p + "." + module + ".callbacks") for p in ("horovod", "hvd_accordion"))
    names = [name for name, value in vars(theirs).items() if isinstance(value, type) and "Callback" in name]
    found[module]["callbacks"] = [len(names), [name for name in names if not hasattr(ours, name)]]
print(json.dumps(list(found.items())))
"""
    return dict(in_a_fresh_process(code))


@needs_tensorflow
def test_tensorflow_brings_neither_torch_nor_mlflow(under_tensorflow):
    names = set(under_tensorflow[None])
    assert {"tensorflow", "keras", "horovod"} <= names and not names & {"torch", "mlflow"}


@needs_tensorflow
@pytest.mark.parametrize("module", REPLACED)
def test_every_public_name_of_horovod_under_tensorflow_is_there(module, under_tensorflow):
    found = under_tensorflow[module]
    assert len(found["names"]) > 35 and {"init", "rank", "allreduce", "DistributedOptimizer"} <= set(found["names"])
    assert not found["missing"] and not found["unlisted"] and not found["listed in vain"]
    assert set(found["replaced"]) == REPLACED[module] and set(found["added"]) == ADDED[module]


@needs_tensorflow
@pytest.mark.parametrize(
    "module",
    [
        "tensorflow",
        "tensorflow.keras",
        "keras",
    ],
)
def test_every_submodule_of_horovod_under_tensorflow_is_there(module, under_tensorflow):
    found = under_tensorflow[module]["submodules"]
    below = {"sync_batch_norm", "elastic", "keras", "keras.callbacks", "keras.elastic"}
    ours = below if module == "tensorflow" else {"callbacks", "elastic"}
    assert {name for name, what in found.items() if what == "ours"} == {f"horovod.{module}.{name}" for name in ours}
    assert f"horovod.{module}.elastic" in found
    assert not {name: what for name, what in found.items() if what not in ("ours", "the same")}


@needs_tensorflow
@pytest.mark.parametrize("module", ["tensorflow.keras", "keras"])
def test_every_callback_of_horovod_is_there(module, under_tensorflow):
    assert under_tensorflow[module]["callbacks"] == [4, []]


@needs_tensorflow
def test_keras_and_its_callbacks_are_ours_even_where_horovods_were_imported_before():
    code = """
import json
import horovod.tensorflow.keras
from hvd_accordion.tensorflow import keras
import hvd_accordion.tensorflow.keras as hvd
print(json.dumps([keras.__name__, hvd.callbacks.__name__]))
"""
    assert in_a_fresh_process(code) == [f"hvd_accordion.tensorflow.keras{tail}" for tail in ("", ".callbacks")]


@needs_tensorflow
def test_the_ways_in_which_keras_scripts_import_it():
    code = """
import json
import hvd_accordion.keras
import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion.tensorflow import *
from hvd_accordion.tensorflow.keras import callbacks
from hvd_accordion.tensorflow.compression import Compression
from hvd_accordion.tensorflow.keras.callbacks import MetricAverageCallback
same = [
    DistributedGradientTape is hvd.DistributedGradientTape,
    hvd_keras.callbacks is callbacks,
    hvd.Compression is Compression,
    callbacks.MetricAverageCallback is MetricAverageCallback,
    hvd_accordion.keras.DistributedOptimizer is hvd_keras.DistributedOptimizer,
    hvd_accordion.keras.callbacks.MetricAverageCallback is MetricAverageCallback,
]
print(json.dumps(same))
"""
    assert in_a_fresh_process(code) == [True] * 6

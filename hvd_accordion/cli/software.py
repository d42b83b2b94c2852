"""Installed versions and the features of Horovod's build. Imports none of the packages into this process."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

from hvd_accordion.cli.findings import Finding, Verdict

# names on PyPI; the first that is installed counts
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "hvd_accordion": ("hvd_accordion",),
    "horovod": ("horovod",),
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-rocm"),
    "keras": ("keras",),
    "numpy": ("numpy",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "matplotlib": ("matplotlib",),
}
FEATURES = ("mpi", "gloo", "nccl", "cuda", "rocm", "ccl", "ddl")
IMPORT_SECONDS = 180.0

PROGRAM = """
import importlib, json
hvd = importlib.import_module("horovod.{framework}")
importlib.import_module("hvd_accordion.{framework}")
built = [name for name in {features} if getattr(hvd, name + "_built")()]
print(json.dumps({{"built": built, "gpus": {gpus}}}))
"""
GPUS = {
    "torch": 'importlib.import_module("torch").cuda.device_count()',
    "tensorflow": 'len(importlib.import_module("tensorflow").config.list_physical_devices("GPU"))',
}
BUILD = {"torch": "HOROVOD_WITH_PYTORCH=1", "tensorflow": "HOROVOD_WITH_TENSORFLOW=1"}


def installed(name: str) -> str | None:
    """Returns the version of one of PACKAGES: None if it cannot be imported, "?" if its version is unknown."""
    if find_spec(name) is None:
        return None
    for project in PACKAGES[name]:
        try:
            return metadata.version(project)
        except metadata.PackageNotFoundError:
            pass
    return "?"


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed PACKAGES."""
    found = {name: installed(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v}}


def required_versions() -> dict[str, str]:
    """Returns the minimum version of each package that hvd_accordion's metadata requires."""
    try:
        lines = metadata.requires("hvd_accordion") or []
    except metadata.PackageNotFoundError:  # hvd_accordion runs from its sources
        return {}
    found = (re.match(r"([\w.-]+) ?>= ?([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def versions(found: Mapping[str, str], required: Mapping[str, str]) -> list[Finding]:
    """Judges the version of each package. Horovod and at least one framework are required."""
    findings = [Finding(Verdict.OK, "Python", found["python"])]
    for name in PACKAGES:
        if name not in found:
            findings.append(Finding(Verdict.NOTE, name, "not installed"))
        elif found[name] != "?" and numbers(found[name]) < numbers(required.get(name, "0")):
            advice = f"at least {required[name]} is required: pip install -U {name}"
            findings.append(Finding(Verdict.BROKEN, name, found[name], advice))
        else:
            findings.append(Finding(Verdict.OK, name, found[name]))
    if "horovod" not in found:
        advice = "install Horovod: make setup, or docker/build_horovod.sh builds it for today's torch and TensorFlow"
        findings.append(Finding(Verdict.BROKEN, "Horovod", "missing", advice))
    if "torch" not in found and "tensorflow" not in found:
        advice = "pip install torch, or tensorflow, before Horovod is built for it"
        findings.append(Finding(Verdict.BROKEN, "framework", "neither torch nor tensorflow is installed", advice))
    return findings


def numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version: (1, 10, 2) for "1.10.2+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z-]", version, maxsplit=1)[0]))


def binding(framework: str, seconds: float = IMPORT_SECONDS) -> Finding:
    """Checks whether Horovod's extension for the framework can be imported, and with which features it was built.

    The import runs in a separate process, because an extension that was built for another version may crash.
    """
    program = PROGRAM.format(framework=framework, features=FEATURES, gpus=GPUS[framework])
    subject = f"horovod.{framework}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
        )
    except subprocess.TimeoutExpired:
        return Finding(Verdict.BROKEN, subject, f"the import took longer than {seconds:g} s")
    if done.returncode:
        advice = (
            f"build Horovod for the installed {framework}: docker/build_horovod.sh, or {BUILD[framework]} "
            "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps horovod"
        )
        return Finding(Verdict.BROKEN, subject, failure_reason(done.returncode, done.stderr), advice)
    found = json.loads(done.stdout.splitlines()[-1])
    return judge_build(subject, found["built"], found["gpus"])


def failure_reason(status: int, stderr: str) -> str:
    """Describes in one line how a Python process failed."""
    if status < 0:
        return f"the import was ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return lines[-1] if lines else f"the import ended with exit status {status}"


def judge_build(subject: str, features: list[str], gpus: int) -> Finding:
    """Judges the features that an extension was built with."""
    found = f"fits; built with {', '.join(features) or 'nothing'}; {gpus} GPU{'s' * (gpus != 1)}"
    if not {"mpi", "gloo"} & set(features):
        return Finding(Verdict.BROKEN, subject, found, "build Horovod with HOROVOD_WITH_MPI=1 or HOROVOD_WITH_GLOO=1")
    if gpus and "nccl" not in features:
        advice = "gradients are copied to the host for communication: build Horovod with HOROVOD_GPU_OPERATIONS=NCCL"
        return Finding(Verdict.SLOW, subject, found, advice)
    return Finding(Verdict.OK, subject, found)

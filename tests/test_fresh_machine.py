"""Set-ups from nothing: each tool that a script calls is one that it installed, or one that every Debian has."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from tests.fresh_machine import PACKAGES, ROOT, FreshMachine

ENGINES = {"docker", "podman"}  # asked for, and not needed
SETUP = set("build-essential cmake iproute2 libopenmpi-dev openmpi-bin openssh-client openssh-server".split())
DEBIANS_PYTHON = {"python3.11-venv", "python3.11-dev"}


@pytest.mark.parametrize("root", [True, False], ids=["as root", "by sudo"])
@pytest.mark.parametrize("own_python", [True, False], ids=["Debian's Python", "another Python"])
def test_make_setup(root, own_python, tmp_path):
    machine = FreshMachine(tmp_path / "m", root=root, sudo=not root, own_python=own_python)
    done = machine.run("make", "setup")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not machine.missed()
    assert set(machine.installed()) == SETUP | (DEBIANS_PYTHON if own_python else set())
    assert "horovod-0.28.1-cp311.whl" in machine.log()[-2] and " -e " in machine.log()[-1]
    assert (machine.checkout / ".venv" / ".ready").exists()


def test_make_setup_again_installs_nothing_and_without_root_says_so(tmp_path):
    machine = FreshMachine(tmp_path / "m", root=False, sudo=False)
    done = machine.run("make", "setup")
    assert done.returncode == 2 and "setup: this needs root: run it as root, or install sudo" in done.stderr
    machine.script("bin/id", "echo 0")
    machine.script("bin/sudo", 'BY_SUDO=1 exec "$@"')
    (machine.folder / "installed").write_text("\n".join(SETUP | DEBIANS_PYTHON) + "\n")
    for tool in ("cmake", "gcc", "g++", "mpicxx"):
        machine.script(f"bin/{tool}", "")
    machine.script("bin/apt-get", "exit 1")
    done = machine.run("make", "setup")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "had", [[], ["buildah", "runc"], ["debootstrap", "python3-pip"]], ids=lambda had: " ".join(had)
)
def test_make_image_by_buildah(had, tmp_path):
    machine = FreshMachine(tmp_path / "m")
    machine.has(*had)
    done = machine.run("make", "image")
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.missed() == ENGINES
    assert sorted(machine.installed()) == ["buildah", "debootstrap", "python3-pip", "runc"]
    calls = [line.split()[0] for line in machine.log()]
    assert "debootstrap" in calls
    assert re.search(r"^buildah .* bud --isolation=chroot .* -t hvd-accordion ", machine.log()[-1])
    done = machine.run("bash", "docker/image.sh", "run", "make", "test-quick")
    assert done.returncode == 0 and machine.missed() == ENGINES, done.stdout + done.stderr
    assert "a-container -- make test-quick" in machine.log()[-2]


def test_without_buildah_and_without_debian_12_image_says_so(tmp_path):
    machine = FreshMachine(tmp_path / "m")
    machine.script("bin/grep", "exit 1")
    done = machine.run("bash", "docker/image.sh", "able")
    assert done.returncode == 1
    assert "there is no buildah, nor a Debian 12 to install it on" in done.stdout


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.gpu"])
def test_hosts_of_an_image_have_what_their_script_calls(dockerfile, tmp_path):
    machine = FreshMachine(tmp_path / "m")
    text = (ROOT / "docker" / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    packages = re.search(r"--no-install-recommends ([^&]*openssh-server[^&]*)&&", text)[1].split()
    machine.has(*(name for name in packages if name in PACKAGES))
    shared = tmp_path / "shared"
    shared.mkdir()
    done = machine.run("bash", "docker/hosts.sh", "serve", FOLDER=str(shared))
    assert done.returncode == 0 and not machine.missed(), done.stdout + done.stderr
    assert machine.log()[-1].startswith("sshd -D -e -f /dev/null -p 2222 -h ")
    machine.script("bin/horovodrun", 'echo "horovodrun $*" >>"$FRESH/log"')  # of the image's own environment
    done = machine.run("bash", "docker/hosts.sh", "train", "true", FOLDER=str(shared), HOSTS="1", WAIT="0")
    assert done.returncode == 0 and not machine.missed(), done.stdout + done.stderr
    assert machine.log()[-1] == "horovodrun -np 1 -H 10.0.0.1:1 true"


def test_the_set_up_installs_all_that_hosts_of_the_tests_need(tmp_path, monkeypatch):
    machine = FreshMachine(tmp_path / "m")
    assert machine.run("make", "setup").returncode == 0
    path = ROOT / "tests" / "hosts" / "ssh_hosts.py"
    spec = importlib.util.spec_from_file_location("ssh_hosts_of_test", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    asked = set()
    monkeypatch.setattr(module, "SSHD", None)
    monkeypatch.setattr(module.shutil, "which", lambda name, **_: asked.add(name))
    for needed in (module.network_module().require, module.require):
        monkeypatch.setattr(module.network_module(), "require", lambda: None)
        with pytest.raises(SystemExit, match="not found"):
            needed()
    assert {"ip", "tc", "ssh", "ssh-keygen", "unshare", "mount", "sysctl"} == asked
    assert asked | {"sshd"} <= machine.tools()

"""A machine on which nothing is installed: a PATH with what Debian always has, and stand-ins for all that sets one up.

The stand-in for apt-get puts onto that PATH the tools of the packages that it is told to install, and nothing else does. So
a script that calls what it did not install ends with "command not found", as it would on a new machine. Nothing is
downloaded, and this machine's own packages are neither asked nor changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# of Debian's packages that are always there (debootstrap --variant=minbase), and make, which the README asks for
ALWAYS = """
    basename bash cat chmod cp cut date dirname env flock grep gzip head hostname id ls make mkdir mktemp mount mv nproc
    printf readlink realpath rm sed seq sh sha256sum sleep sort tail tar touch tr true unshare
""".split()
# what each package brings, with the packages that it depends on
PACKAGES = {
    "build-essential": "gcc g++ make",
    "buildah": "buildah",
    "cmake": "cmake",
    "debootstrap": "debootstrap",
    "iproute2": "ip tc",
    "libopenmpi-dev": "mpicc mpicxx",
    "openmpi-bin": "mpirun mpiexec",
    "openssh-client": "ssh ssh-keygen",
    "openssh-server": "sshd sysctl",
    "python3.11-dev": "",
    "python3.11-venv": "",
    "python3-pip": "",
    "runc": "runc",
}

APT_GET = """
[ "$1" = install ] || exit 0
shift
for word; do
  case $word in -*) continue ;; esac
  tools=$(grep "^$word:" "$FRESH/packages") || { echo "E: Unable to locate package $word" >&2; exit 100; }
  echo "$word" >>"$FRESH/installed"
  for tool in ${tools#*:}; do cp "$FRESH/stand-ins/$tool" "$FRESH/bin/$tool"; done
done
"""
DPKG_QUERY = """
case $1 in
  -S) case $2 in "$FRESH"/bin/*) ;; *) exit 1 ;; esac ;;      # the owner of a file
  -W) if grep -qx "$3" "$FRESH/installed"; then printf installed; else exit 1; fi ;;
esac
"""
# A Python as far as a set-up calls it. One of Debian's own has no venv, pip or headers but from their packages.
PYTHON = """
installed() { case $0 in "$FRESH"/bin/*) grep -qx "$1" "$FRESH/installed" ;; esac; }
case "$*" in
  "-m venv "*) installed python3.11-venv && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version"|"-m pip config list") installed python3-pip ;;
  "-m pip download "*)
    installed python3-pip && mkdir -p "$TMPDIR/horovod-0.28.1/horovod/torch" "$TMPDIR/horovod-0.28.1/horovod/tensorflow"
    cd "$TMPDIR/horovod-0.28.1" && touch CMakeLists.txt horovod/torch/CMakeLists.txt horovod/tensorflow/CMakeLists.txt
    while [ "$1" != -d ]; do shift; done
    tar -czf "$2/horovod-0.28.1.tar.gz" -C "$TMPDIR" horovod-0.28.1 ;;
  "-m pip wheel "*)
    for tool in cmake make gcc g++ mpicxx; do command -v "$tool" >/dev/null || exit 1; done
    [ -n "$OWN_HEADERS" ] || grep -qx python3.11-dev "$FRESH/installed" || exit 1
    while [ "$1" != -w ]; do shift; done
    mkdir -p "$2" && touch "$2/horovod-0.28.1-cp311.whl" ;;
  "-m pip install "*) installed python3-pip && echo "pip $*" >>"$FRESH/log" ;;
  -|"- "*) cat >/dev/null; echo some-key ;;
  *) exit 1 ;;    # -c: what it asks for is not installed
esac
"""
TOOLS = {
    "buildah": 'case "$*" in *inspect*) exit 1 ;; *" from "*) echo a-container ;; esac',
    "debootstrap": 'mkdir -p "$3/etc/apt/apt.conf.d"',
    "ssh-keygen": 'while [ "$1" != -f ]; do shift; done; echo PRIVATE >"$2"; echo "ssh-ed25519 KEY a-host" >"$2.pub"',
}
HERE = {  # commands that are there, but would ask this machine
    "dpkg-query": DPKG_QUERY,
    "grep": 'case "$*" in *" /etc/os-release") exit 0 ;; esac; exec {grep} "$@"',
    "hostname": "echo 10.0.0.1",
    "unshare": "",
}


class FreshMachine:
    """One below `folder`, with a copy of what sets the project up."""

    def __init__(self, folder: Path, root: bool = True, sudo: bool = False, own_python: bool = True) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        for name in ("bin", "stand-ins", "home", "tmp", "elsewhere"):
            (folder / name).mkdir(parents=True)
        for name in ("installed", "log", "missed"):
            (folder / name).touch()
        (folder / "packages").write_text("".join(f"{name}:{tools}\n" for name, tools in PACKAGES.items()))
        for name in ALWAYS:
            found = shutil.which(name)
            assert found, f"{name} not found"
            (folder / "bin" / name).symlink_to(found)
        for tool in " ".join(PACKAGES.values()).split():
            if tool not in ALWAYS:
                self.script(f"stand-ins/{tool}", f'echo "{tool} $*" >>"$FRESH/log"\n{TOOLS.get(tool, "")}')
        shutil.copy(shutil.which("make") or "", folder / "stand-ins" / "make")
        here = {**HERE, "id": f"echo {0 if root else 1000}", "apt-get": APT_GET}
        if not root:  # as Debian's would refuse
            here["apt-get"] = f'[ -n "$BY_SUDO" ] || exit 100\n{APT_GET}'
        if sudo:
            here["sudo"] = 'BY_SUDO=1 exec "$@"'
        for name, text in here.items():
            self.script(f"bin/{name}", text.replace("{grep}", shutil.which("grep") or ""))
        self.python = "bin" if own_python else "elsewhere"
        self.script(f"{self.python}/python3.11", PYTHON)
        (folder / self.python / "python3").symlink_to("python3.11")
        (self.checkout / "hvd_accordion").mkdir(parents=True)
        for name in ("Makefile", "setup.cfg", "hvd_accordion/__init__.py"):
            shutil.copy(ROOT / name, self.checkout / name)
        shutil.copytree(ROOT / "docker", self.checkout / "docker")

    def script(self, name: str, text: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def has(self, *packages: str) -> None:
        """They were installed before."""
        subprocess.run(["apt-get", "install", *packages], check=True, timeout=60, env=self.environment())

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:{self.folder}/elsewhere",
            "FRESH": str(self.folder),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "LANG": "C.UTF-8",
            "TORCH_INDEX_URL": "https://example.org/cpu",
            "OWN_HEADERS": "" if self.python == "bin" else "1",
            # bash calls it for what is not on the PATH, also where a script throws the message away
            "BASH_FUNC_command_not_found_handle%%": '() { echo "$1" >>"$FRESH/missed"; return 127; }',
        }

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.checkout,
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installed(self) -> list[str]:
        """Packages, in the order in which apt-get was told of them."""
        return (self.folder / "installed").read_text().split()

    def log(self) -> list[str]:
        """Calls of the tools that came with packages, and of pip."""
        return (self.folder / "log").read_text().splitlines()

    def missed(self) -> set[str]:
        """Commands that were called and not there."""
        return set((self.folder / "missed").read_text().split())

    def tools(self) -> set[str]:
        return set(os.listdir(self.folder / "bin"))

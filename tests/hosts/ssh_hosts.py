"""Hosts that reach each other by name and by ssh: namespaces of one machine, each with a name, an address and an sshd.

Keys and settings lie in a folder of the test; neither ~/.ssh nor /etc/ssh is read or written. The network is the
benchmarks' (examples/benchmarks/hosts.py), which kills at its end whatever still runs on a host.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
HOROVODRUN = Path(sys.executable).parent / "horovodrun"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))

# A cut link shows only by silence. These give it so many seconds, instead of the minutes that they have by default.
KEEPALIVE = {  # of Open MPI's daemons: 2 s of silence, then two questions, 2 s each
    "OMPI_MCA_oob_tcp_keepalive_time": "2",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "2",
    "OMPI_MCA_oob_tcp_keepalive_probes": "2",
}
RETRIES = 4  # of TCP, 0.2 s, 0.4 s, 0.8 s... apart: about 6 s in all

CLIENT = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  LogLevel ERROR
  ConnectTimeout 5
"""
SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PermitUserRC no
ClientAliveInterval 2
ClientAliveCountMax 5
"""
# Gives a process a host's name, and the names of all of them
NAMED = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class Ended(NamedTuple):
    status: int
    output: str


@dataclass
class Hosts:
    """Hosts that are up; horovodrun runs on the first."""

    network: Any
    folder: Path
    names: list[str]
    module: ModuleType
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        named = ["unshare", "--uts", "sh", "-c", NAMED, self.names[host], str(self.folder / "hosts")]
        return self.network.start(host, [*named, *command], **options)

    def launch(self, command: Sequence[str], transport: str, **env: str) -> subprocess.Popen[bytes]:
        """horovodrun, one rank on each host, over ssh as a user of Horovod has it; its output goes to a file."""
        where = ",".join(f"{name}:1" for name in self.names)
        environment = {
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{self.folder}:{os.environ['PATH']}",  # the folder's ssh
            "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores
            "OMPI_MCA_btl": "tcp,self",  # as between machines: memory can't be shared
            "OMPI_MCA_btl_tcp_if_include": "eth0",
            "OMPI_MCA_oob_tcp_if_include": "eth0",
            **KEEPALIVE,
            # from three ranks on, the order of a sum depends on what Horovod happens to fuse
            **({"HOROVOD_FUSION_THRESHOLD": "0"} if len(self.names) > 2 else {}),
            **env,
        }
        run = [str(HOROVODRUN), "-np", str(len(self.names)), "-H", where, f"--{transport}"]
        run += ["--network-interfaces", "eth0", "--disable-cache"]  # which would be kept in the home folder
        with open(self.folder / "output", "wb") as output:
            return self.start(0, [*run, *command], env=environment, output=output)

    def await_end(self, job: subprocess.Popen[bytes], timeout: float) -> Ended:
        """AssertionError with what the job wrote if it takes longer."""
        try:
            return Ended(job.wait(timeout), self.output())
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {timeout} s:\n{self.output()}") from None

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def cut(self, host: int) -> None:
        """Takes a host's link away: nothing arrives any more and nobody is told, as when a cable is pulled."""
        self.module.run("ip", "-n", self.network.switch, "link", "set", f"port{host}", "down")

    def running(self) -> list[psutil.Process]:
        """What runs on the hosts beside the daemons that listen."""
        own, found = {daemon.pid for daemon in self.daemons}, []
        for namespace in self.network.namespaces:
            listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
            for pid in map(int, listed.stdout.split()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if pid not in own and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def await_nothing_running(self, timeout: float) -> float:
        """Seconds until all that ran on the hosts had ended; AssertionError with what is left after `timeout`."""
        begin = time.monotonic()
        while left := self.running():
            seconds = time.monotonic() - begin
            assert seconds < timeout, f"left after {timeout} s: {[describe(process) for process in left]}"
            time.sleep(0.1)
        return time.monotonic() - begin


@contextlib.contextmanager
def ssh_hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """`count` hosts node1, node2... whose sshds answer. SystemExit with a line on what is missing where there can be none."""
    module = network_module()
    with module.hosts(count) as network:
        hosts = Hosts(network, folder, [f"node{i + 1}" for i in range(count)], module)
        write_settings(hosts)
        for i, namespace in enumerate(network.namespaces):
            module.run("ip", "netns", "exec", namespace, "sysctl", "-q", "-w", f"net.ipv4.tcp_retries2={RETRIES}")
            command = [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")]
            with open(folder / f"sshd{i}.log", "wb") as log:
                hosts.daemons.append(hosts.start(i, command, output=log))
        for i in range(1, count):
            await_login(hosts, i)
        yield hosts


def require() -> None:
    """SystemExit with a line on what is missing for such hosts."""
    network = network_module()
    network.require()
    missing = [tool for tool in ("ssh", "ssh-keygen", "unshare", "mount", "sysctl") if not shutil.which(tool)]
    missing += [] if SSHD else ["sshd"]
    if missing:
        sys.exit(f"hosts: {' and '.join(missing)} not found; on Debian: apt-get install openssh-server")
    with network.hosts(1):  # are namespaces permitted?
        pass


def write_settings(hosts: Hosts) -> None:
    folder = hosts.folder
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    named = zip(hosts.network.addresses, hosts.names, strict=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in named))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in hosts.names))
    agent = folder / "ssh"
    agent.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    agent.chmod(0o700)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the empty folder that sshd insists on


def await_login(hosts: Hosts, host: int, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        command = [str(hosts.folder / "ssh"), hosts.names[host], "hostname"]
        trial = hosts.start(0, command, output=subprocess.PIPE)
        answer = trial.communicate(timeout=timeout)[0].decode()
        if answer == f"{hosts.names[host]}\n":
            return
        log = (hosts.folder / f"sshd{host}.log").read_text()
        assert time.monotonic() < deadline, f"no login on {hosts.names[host]}: {answer}{log}"
        time.sleep(0.1)


def describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    return f"{process.pid}, gone"


def network_module() -> ModuleType:
    """The benchmarks' network, which is a program's module and no package's."""
    name = "benchmark_hosts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "benchmarks" / "hosts.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]

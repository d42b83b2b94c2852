"""Several hosts on one machine: network namespaces connected by a bridge over links of adjustable rate, for MPI ranks.

Needs Linux, root, and `ip` and `tc` of iproute2. Everything is removed at the end, however the program ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# Ends the processes in the namespaces $@ and removes them, with bridge and links, as soon as its stdin is closed. The
# program closes it, also by its own end, whatever the cause.
CARETAKER = """
cat >/dev/null
for attempt in $(seq 100); do
  pids=$(for name in "$@"; do ip netns pids "$name"; done 2>/dev/null)
  [ -n "$pids" ] || break
  kill -KILL $pids 2>/dev/null
  sleep 0.05
done
for name in "$@"; do ip netns del "$name" 2>/dev/null; done
"""


@dataclass
class Network:
    """Running hosts, numbered from 0."""

    namespaces: list[str]
    addresses: list[str]
    switch: str  # the namespace of the bridge; its port i leads to host i
    burst: str = "512kb"  # passes unshaped after a pause: 41 ms at 100 Mbit/s
    rate: str | None = None
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def set_rate(self, rate: str | None) -> None:
        """Shapes every link, in both directions, to a rate as `tc` writes it ("100mbit"); None removes the limit."""
        for i, namespace in enumerate(self.namespaces):
            for where, device in ((namespace, "eth0"), (self.switch, f"port{i}")):
                if rate:  # tbf, because some kernels lack netem
                    shape = f"tbf rate {rate} burst {self.burst} latency 100ms"
                    run("tc", "-n", where, *f"qdisc replace dev {device} root {shape}".split())
                elif self.rate:
                    run("tc", "-n", where, *f"qdisc del dev {device} root".split())
        self.rate = rate

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Returns the command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.namespaces[host], *command]

    def start(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: IO[Any] | int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process on a host in its own session, so that signals of the terminal do not reach it."""
        process = subprocess.Popen(
            self.command(host, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def wait(self) -> None:
        """Waits for all started processes."""
        for process in self._processes:
            process.wait()


@contextlib.contextmanager
def hosts(count: int, rate: str | None = None) -> Iterator[Network]:
    """`count` hosts with addresses 10.77.0.1, 10.77.0.2...; at the end their processes are killed."""
    require()
    prefix = f"accordion-{os.getpid()}"
    switch, namespaces = f"{prefix}-0", [f"{prefix}-{i + 1}" for i in range(count)]
    network = Network(namespaces, [f"10.77.0.{i + 1}" for i in range(count)], switch)
    caretaker = subprocess.Popen(
        ["sh", "-c", CARETAKER, "caretaker", *namespaces, switch], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        for namespace in (switch, *namespaces):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, *"link set lo up".split())
        run("ip", "-n", switch, *"link add bridge type bridge".split())
        run("ip", "-n", switch, *"link set bridge up".split())
        for i, (namespace, address) in enumerate(zip(namespaces, network.addresses, strict=True)):
            run("ip", "-n", switch, *f"link add port{i} type veth peer name eth0 netns {namespace}".split())
            run("ip", "-n", switch, *f"link set port{i} master bridge up".split())
            run("ip", "-n", namespace, *f"addr add {address}/24 dev eth0".split())
            run("ip", "-n", namespace, *"link set eth0 up".split())
        network.set_rate(rate)
        yield network
    finally:
        assert caretaker.stdin
        caretaker.stdin.close()
        caretaker.wait()
        network.wait()


def require() -> None:
    """Exits with a message if something is missing."""
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        sys.exit(f"hosts: {' and '.join(missing)} not found; on Debian: apt-get install iproute2")
    if os.geteuid() != 0:
        sys.exit("hosts: network namespaces need root")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    error = done.stderr.strip().replace("\n", "; ")
    hint = ""
    if "ermi" in error:  # "Operation not permitted", "Permission denied"
        hint = " (network namespaces are not permitted here; in a container they need CAP_SYS_ADMIN and CAP_NET_ADMIN)"
    sys.exit(f"hosts: `{' '.join(command)}` failed: {error}{hint}")


def environment(cycle_time: float) -> dict[str, str]:
    """One thread per rank, and Horovod over MPI, because Gloo would take a stopped peer for a dead one."""
    return {
        "OMP_NUM_THREADS": "1",
        "HOROVOD_CYCLE_TIME": f"{cycle_time:g}",
        "HOROVOD_CONTROLLER": "mpi",
        "HOROVOD_CPU_OPERATIONS": "mpi",
        "HOROVOD_STALL_CHECK_DISABLE": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # MPI must not poll on a core that another rank computes on
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def write_agent(network: Network, folder: Path) -> Path:
    """Writes a script that mpirun uses as ssh: it runs a command on the host of an address."""
    agent = folder / "agent.sh"
    prefix = network.namespaces[0].removesuffix("1")
    agent.write_text(f'#!/bin/sh\nhost={prefix}${{1##*.}}\nshift\nexec ip netns exec "$host" sh -c "$*"\n')
    agent.chmod(0o700)
    return agent


def mpirun(network: Network, agent: Path) -> list[str]:
    """Returns the mpirun command line, started on the first host, that starts one rank on every host."""
    where = ",".join(f"{address}:1" for address in network.addresses)
    command = ["mpirun", "--allow-run-as-root", "-np", str(len(network.addresses)), "-H", where, "-bind-to", "none"]
    command += ["-mca", "plm_rsh_agent", str(agent), "-mca", "orte_leave_session_attached", "1"]
    return command + "-mca btl tcp,self -mca btl_tcp_if_include eth0 -mca oob_tcp_if_include eth0".split()

"""Hosts in network namespaces: what they say where they can't be, and, as root, that links limit and nothing is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.serial

FILE = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "hosts.py"
SIZE = 2_000_000

RECEIVE = f"""
import socket, sys, time
with socket.create_server((sys.argv[1], 7000)) as server:
    print("listening", flush=True)
    connection = server.accept()[0]
    begin, left = time.perf_counter(), {SIZE}
    while left:
        left -= len(connection.recv(65536))
print(time.perf_counter() - begin)
"""
SEND = f"import socket, sys; socket.create_connection((sys.argv[1], 7000), 5).sendall(bytes({SIZE}))"
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from hosts import hosts
with hosts(2) as network:
    network.start(1, ["sleep", "1000"])
    print("up", flush=True)
    time.sleep(1000)
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_hosts", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


module = load()


@pytest.fixture
def allowed() -> None:
    """Skips the test where namespaces can't be made."""
    try:
        with module.hosts(1, "1gbit"):
            pass
    except SystemExit as error:
        pytest.skip(str(error))


def left_by(pid: int) -> list[str]:
    """Namespaces and processes of the program `pid`."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"accordion-{pid}-")]


def seconds(network, sender: int, receiver: int) -> float:
    """How long the bytes take, by the receiver's clock."""
    address = network.addresses[receiver]
    receiving = network.start(receiver, [sys.executable, "-c", RECEIVE, address], output=subprocess.PIPE)
    assert receiving.stdout.readline() == b"listening\n"
    network.start(sender, [sys.executable, "-c", SEND, address])
    return float(receiving.communicate(timeout=30)[0])


def test_without_root(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="need root"), module.hosts(2):
        pass


def test_without_iproute2(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"ip and tc not found.* apt-get install iproute2"), module.hosts(2):
        pass


def test_not_permitted(monkeypatch):
    def refuse(command, **_):
        error = "mount --make-shared /run/netns failed: Operation not permitted\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(module.subprocess, "run", refuse)
    with pytest.raises(SystemExit, match=r"not permitted here.*CAP_SYS_ADMIN") as raised:
        module.run("ip", "netns", "add", "x")
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(60)
def test_a_shaped_link_limits(allowed):
    with module.hosts(2, "20mbit") as network:
        assert len(left_by(os.getpid())) == 3
        # of 0.8 s a burst goes at once, at either end of the link
        assert 0.4 < seconds(network, 0, 1) < 2
        network.set_rate(None)
        assert seconds(network, 1, 0) < 0.3
        network.set_rate("20mbit")
        assert 0.4 < seconds(network, 1, 0) < 2
    assert not left_by(os.getpid())


@pytest.mark.timeout(60)
def test_nothing_is_left_after_an_error(allowed):
    with pytest.raises(KeyboardInterrupt), module.hosts(2) as network:
        process = network.start(0, ["sleep", "1000"])
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGKILL
    assert not left_by(os.getpid())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(allowed, signum):
    program = subprocess.Popen([sys.executable, "-c", HOLD, str(FILE.parent)], stdout=subprocess.PIPE)
    assert program.stdout.readline() == b"up\n"
    assert len(left_by(program.pid)) == 3
    program.send_signal(signum)
    program.wait()
    program.stdout.close()
    deadline = time.monotonic() + 20
    while left_by(program.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_by(program.pid)

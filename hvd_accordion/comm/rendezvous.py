"""Gloo rendezvous for launchers that Horovod does not know: rank 0 starts Horovod's rendezvous server, all ranks meet there.

Horovod's internals are used in this file alone: the server (its class, GET and PUT of /scope/key) and, in
`environment`, the variables that `horovodrun --gloo` sets.

The server's port follows from the job's name, which all ranks know. Each rank stores its host there; rank 0 numbers the
ranks and stores each rank's place.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hvd_accordion.comm.launchers import Launched, StartError

PORTS = range(20000, 30000)  # below those that systems give to connections
TRIES = 8  # ports of a job: another program may have the first
LOOPBACK = "127.0.0.1"
REQUEST = 5.0  # seconds
PAUSE = 0.05  # seconds between two requests
SCOPE = "hvd_accordion"
FAILURES = (OSError, http.client.HTTPException, ValueError)  # of a request; the last: another program's answer


class Arrival(NamedTuple):
    """What a rank stores on arrival: its host, its own address towards rank 0, and rank 0's address as it sees it."""

    node: str
    own: str
    server: str


class Place(NamedTuple):
    """A rank's numbers, as Horovod counts them, and the address by which other ranks reach it."""

    hostname: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    address: str


def ports(job: str) -> list[int]:
    """The ports that rank 0 of a job tries in turn: it listens on the first free one."""
    start = int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big")
    return [PORTS[(start + 101 * i) % len(PORTS)] for i in range(TRIES)]


def places(arrivals: Sequence[Arrival]) -> list[Place]:
    """The place of every rank. Local ranks of a host are numbered in the order of the ranks."""
    nodes = [its.node for its in arrivals]
    members = {node: [rank for rank, its in enumerate(nodes) if its == node] for node in dict.fromkeys(nodes)}
    first = nodes[0]
    seen = next(
        (its.server for its in arrivals if its.node != first), LOOPBACK
    )  # rank 0's host, by those who must reach it
    result = []
    for rank, its in enumerate(arrivals):
        local = members[its.node].index(rank)
        peers = [node for node, ranks in members.items() if len(ranks) > local]
        address = LOOPBACK if len(members) == 1 else seen if its.node == first else its.own
        size = len(members[its.node])
        result.append(Place(its.node, rank, len(arrivals), local, size, peers.index(its.node), len(peers), address))
    return result


def environment(place: Place, server: tuple[str, int], interface: str) -> dict[str, str]:
    """The variables that `horovodrun --gloo` would set."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": server[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server[1]),
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_HOSTNAME": place.hostname,
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(place.size),
        "HOROVOD_LOCAL_RANK": str(place.local_rank),
        "HOROVOD_LOCAL_SIZE": str(place.local_size),
        "HOROVOD_CROSS_RANK": str(place.cross_rank),
        "HOROVOD_CROSS_SIZE": str(place.cross_size),
    }


def join(me: Launched, environ: Mapping[str, str], seconds: float) -> dict[str, str]:
    """Meets the other ranks. Returns the variables to set before Horovod starts.

    Raises StartError on every rank that has arrived, if not all ranks arrive within `seconds`.
    """
    until = time.monotonic() + seconds
    server = _serve(me) if me.rank == 0 else None
    where = (LOOPBACK, server.server_address[1]) if server else _find(me, until, seconds)
    until = time.monotonic() + seconds + REQUEST  # rank 0 waits no longer than this
    _, own, its = _request(where, "GET", "job")
    _put(where, str(me.rank), Arrival(f"{socket.gethostname()}-{me.node}", own, its), until)
    if server:
        _assign(server, where, me, seconds)
    answer = _await(where, f"place-{me.rank}", until)
    if answer is None:
        raise StartError(
            f"{me.launcher}: rank 0 at {where[0]}:{where[1]} gave rank {me.rank} no place within {seconds:g} s"
        )
    if isinstance(answer, str):
        raise StartError(answer)
    place = Place(*answer)
    interface = environ.get("HOROVOD_GLOO_IFACE") or _interface(place.address)
    return environment(place, (its, where[1]), interface)


def _serve(me: Launched) -> Any:
    """Horovod's server, on a daemon thread. It stays for process sets that are added later."""
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    class Server(RendezvousHTTPServer):  # type: ignore[misc]  # it has no annotations
        request_queue_size = 1024  # all ranks come at once
        daemon_threads = True

    host = LOOPBACK if me.address == LOOPBACK else ""
    for port in ports(me.job):
        try:
            server = Server((host, port), RendezvousHandler, 0)
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, name="hvd_accordion.rendezvous", daemon=True).start()
        _put((LOOPBACK, port), "job", me.job, time.monotonic() + REQUEST)
        return server
    raise StartError(f"{me.launcher}: rank 0 found none of the ports {ports(me.job)} free")


def _find(me: Launched, until: float, seconds: float) -> tuple[str, int]:
    """The address of this job's server. Another program or job may answer on one of the ports."""
    problem = ""
    while True:
        for port in ports(me.job):
            try:
                if _get((me.address, port), "job") == me.job:
                    return me.address, port
            except FAILURES as error:
                problem = str(error)
            if time.monotonic() > until:
                found = f"{me.launcher}: rank {me.rank} did not find rank 0 at {me.address} within {seconds:g} s"
                raise StartError(f"{found}, ports {ports(me.job)} ({problem or 'others answer there'}); {_alone(me)}")
        time.sleep(PAUSE)


def _assign(server: Any, where: tuple[str, int], me: Launched, seconds: float) -> None:
    """Rank 0 waits for all ranks and stores each rank's place; if ranks are missing, it stores the error for each."""
    until = time.monotonic() + seconds
    answers = [_await(where, str(rank), until) for rank in range(me.size)]
    if missing := [rank for rank, answer in enumerate(answers) if answer is None]:
        named = f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        problem = (
            f"{me.launcher} started {me.size} processes ({me.variable}={me.size}), but rank {named} did not come to "
        )
        problem += f"hvd.init() within {seconds:g} s; {_alone(me)}"
        for rank in range(me.size):
            _put(where, f"place-{rank}", problem, time.monotonic() + REQUEST)
        time.sleep(10 * PAUSE)  # the server goes with this process
        raise StartError(problem)
    found = places([Arrival(*answer) for answer in answers])
    server.init(found)  # clears all values
    for place in found:
        _put(where, f"place-{place.rank}", place, time.monotonic() + REQUEST)


def _alone(me: Launched) -> str:
    return f"HOROVOD_START_TIMEOUT gives them longer; if this process is meant to be alone, unset {me.variable}"


def _interface(address: str) -> str:
    """The network interface that has this address; Gloo needs its name."""
    import psutil

    wanted = LOOPBACK if address.startswith("127.") else address
    for name, addresses in psutil.net_if_addrs().items():
        if any(its.family == socket.AF_INET and its.address == wanted for its in addresses):
            return str(name)
    raise StartError(
        f"other hosts reach this one by {address}, which none of its interfaces has: set HOROVOD_GLOO_IFACE"
    )


def _get(where: tuple[str, int], key: str) -> Any:
    """The value that the server holds under a key; None if it holds none."""
    text, _, _ = _request(where, "GET", key)
    return None if text is None else json.loads(text)


def _await(where: tuple[str, int], key: str, until: float) -> Any:
    """Waits for a value under a key; None after the time `until`."""
    while True:
        try:
            if (answer := _get(where, key)) is not None:
                return answer
        except FAILURES:
            pass
        if time.monotonic() > until:
            return None
        time.sleep(PAUSE)


def _put(where: tuple[str, int], key: str, value: Any, until: float) -> None:
    while True:
        try:
            if _request(where, "PUT", key, json.dumps(value).encode())[0] is not None:
                return
            problem = "refused"
        except FAILURES as error:
            problem = str(error)
        if time.monotonic() > until:
            raise StartError(f"rank 0's server at {where[0]}:{where[1]} takes nothing: {problem}")
        time.sleep(PAUSE)


def _request(where: tuple[str, int], method: str, key: str, body: bytes | None = None) -> tuple[bytes | None, str, str]:
    """The answer (None for a refusal), this side's address and the server's. Ignores proxies."""
    connection = http.client.HTTPConnection(*where, timeout=REQUEST)
    try:
        connection.connect()
        own, its = connection.sock.getsockname()[0], connection.sock.getpeername()[0]
        connection.request(method, f"/{SCOPE}/{key}", body)
        response = connection.getresponse()
        text = response.read()
        return (text if response.status == http.client.OK else None), own, its
    finally:
        connection.close()

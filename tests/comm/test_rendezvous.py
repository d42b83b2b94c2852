"""Where ranks are that a launcher started, and how they find each other; here each is a thread."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvd_accordion.comm import rendezvous
from hvd_accordion.comm.launchers import Launched, StartError
from hvd_accordion.comm.rendezvous import Arrival, join, places, ports

pytest.importorskip("horovod")


def members(job, size, nodes="", address="127.0.0.1"):
    return [Launched("srun", rank, size, "TASKS", address, nodes[rank : rank + 1], job) for rank in range(size)]


def joined(ranks, seconds=20.0, environ=()):
    """What each rank's `join` returned or raised."""

    def one(me):
        try:
            return join(me, dict(environ), seconds)
        except StartError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_places_count_as_horovod_counts():
    """As horovod.runner.common.util.hosts numbers the ranks of hosts a (3 ranks), b (1), c (2)."""
    hosts = pytest.importorskip("horovod.runner.common.util.hosts")
    slots = hosts.get_host_assignments(hosts.parse_hosts("a:3,b:1,c:2"), 6)
    found = places([Arrival(node, f"own-{node}", "rank-0") for node in "aaabcc"])
    for place, slot in zip(found, slots, strict=True):
        for name in ("hostname", "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size"):
            assert getattr(place, name) == getattr(slot, name)


def test_ranks_dealt_out_over_hosts_in_turn():
    found = places([Arrival(node, "", "") for node in "abab"])
    assert [(its.local_rank, its.cross_rank) for its in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_address_of_a_rank_is_the_one_that_others_reach():
    on_a, on_b = Arrival("a", "127.0.1.1", "127.0.1.1"), Arrival("b", "10.0.0.2", "10.0.0.1")
    assert [its.address for its in places([on_a, on_a, on_b])] == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    assert [its.address for its in places([on_a, on_a])] == ["127.0.0.1", "127.0.0.1"]


def test_ranks_meet():
    first, second, third = joined(members("meet", 3, "001"))
    assert {its["HOROVOD_GLOO_RENDEZVOUS_PORT"] for its in (first, second, third)} <= {str(x) for x in ports("meet")}
    assert [its["HOROVOD_RANK"] for its in (first, second, third)] == ["0", "1", "2"]
    assert [its["HOROVOD_LOCAL_RANK"] for its in (first, second, third)] == ["0", "1", "0"]
    assert [its["HOROVOD_CROSS_SIZE"] for its in (first, second, third)] == ["2", "1", "2"]
    assert first["HOROVOD_HOSTNAME"] == second["HOROVOD_HOSTNAME"] != third["HOROVOD_HOSTNAME"]
    assert first["HOROVOD_CONTROLLER"] == first["HOROVOD_CPU_OPERATIONS"] == "gloo"
    assert rendezvous._interface("127.0.0.1") == first["HOROVOD_GLOO_IFACE"]


def test_another_program_or_job_at_the_first_ports(monkeypatch):
    silent, other = socket.socket(), members("another job", 1)[0]
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr(rendezvous, "REQUEST", 0.5)
    join(other, {}, 5.0)
    taken = [silent.getsockname()[1], ports(other.job)[0]]
    monkeypatch.setattr(rendezvous, "ports", lambda job: [*taken, *ports(job)])
    with silent:
        first, second = joined(members("late", 2))
    assert first["HOROVOD_GLOO_RENDEZVOUS_PORT"] == second["HOROVOD_GLOO_RENDEZVOUS_PORT"] == str(ports("late")[0])


def test_a_rank_that_does_not_come_is_named_on_all_that_are_there():
    begin = time.monotonic()
    zero, one, _, three = members("missing", 4)
    errors = joined([zero, one, three], seconds=1.0)
    assert time.monotonic() - begin < 10
    assert len({str(error) for error in errors}) == 1
    assert "srun started 4 processes (TASKS=4), but rank 2 did not come to hvd.init() within 1 s" in str(errors[0])
    assert "unset TASKS" in str(errors[0])


def test_without_rank_0_nobody_waits_for_ever():
    with pytest.raises(StartError, match=r"rank 1 did not find rank 0 at 127\.0\.0\.1 within 0\.5 s.*refused"):
        join(members("headless", 2)[1], {}, 0.5)
    nowhere = members("headless", 2, address="no.such.host.invalid")[1]
    with pytest.raises(StartError, match=r"at no\.such\.host\.invalid within 0\.5 s"):
        join(nowhere, {}, 0.5)


def test_an_address_that_no_interface_has():
    with pytest.raises(StartError, match=r"192\.0\.2\.1, which none of its interfaces has: set HOROVOD_GLOO_IFACE"):
        rendezvous._interface("192.0.2.1")
    found = joined(members("given", 2), environ={"HOROVOD_GLOO_IFACE": "chosen"})
    assert [its["HOROVOD_GLOO_IFACE"] for its in found] == ["chosen", "chosen"]

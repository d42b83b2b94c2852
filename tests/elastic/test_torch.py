"""Compressed training in torch where workers come, go and die."""

import random

import pytest

from tests.elastic.changes import sizes
from tests.elastic.job import run

pytestmark = pytest.mark.parallel

DOCUMENTED = ["add 1", "add 1", "remove 1", "add 1", "kill 1", "add 1", "kill 0 2"]


def check(events, start, changes):
    """Every phase was gone through, by ranks that the worker found equal and right, and training went on."""
    first = [e for e in events if e["rank"] == 0]
    seen = [e["size"] for i, e in enumerate(first) if i == 0 or e["size"] != first[i - 1]["size"]]
    assert seen == sizes(start, changes)
    ends = [e for e in events if e.get("over")]
    assert len(ends) == seen[-1] and {e["size"] for e in ends} == {seen[-1]}
    assert {e["passes"] for e in ends} == {4}  # the batch grew, and all know
    assert len({str(e["regimes"]) for e in ends}) == 1
    assert all(ends[0]["losses"][kind] < 0.2 * loss for kind, loss in first[0]["losses"].items()), ends


def test_workers_come_go_and_die(tmp_path):
    check(run("torch/compressed", tmp_path, 1, DOCUMENTED, timeout=240), 1, DOCUMENTED)


def test_ten_changes(tmp_path):
    changes = drawn(10, random.Random(142))
    check(run("torch/compressed", tmp_path, 2, changes, timeout=240), 2, changes)


def drawn(count, generator, size=2, most=3):
    """So many changes of any kind, one after another, of a job that begins with `size` workers."""
    changes = []
    for _ in range(count):
        kind = generator.choice(
            ["add"] if size == 1 else ["remove", "kill"] if size == most else ["add", "remove", "kill"]
        )
        if kind == "add":
            change = [generator.randint(1, most - size)]
        else:
            change = sorted(generator.sample(range(size), generator.randint(1, size - 1)))
        changes.append(f"{kind} {' '.join(map(str, change))}")
        size = sizes(size, changes[-1:])[-1]
    return changes

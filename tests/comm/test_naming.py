"""Names of collectives."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from types import SimpleNamespace

import pytest

from hvd_accordion.comm import naming
from hvd_accordion.comm.naming import Prefix

ALL, SOME = SimpleNamespace(process_set_id=0), SimpleNamespace(process_set_id=3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Other tests of this process draw names, too."""
    monkeypatch.setattr(naming, "_drawn", defaultdict(count))


def test_a_prefix_names_the_process_set_and_is_numbered_there():
    names = [str(Prefix(process_set)) for process_set in (ALL, ALL, SOME, ALL, SOME)]
    assert names == [f"hvd_accordion.{tail}" for tail in ("0.0", "0.1", "3.0", "0.2", "3.1")]


def test_a_prefix_is_drawn_when_it_is_first_written_not_when_it_is_made():
    unused, late, early = Prefix(ALL), Prefix(ALL), Prefix(ALL)
    assert (str(early), f"{late}.norms") == ("hvd_accordion.0.0", "hvd_accordion.0.1.norms")
    assert str(unused) == "hvd_accordion.0.2"


def test_a_prefix_never_changes():
    first = Prefix(ALL)
    names = {str(first)}
    str(Prefix(ALL))
    assert names == {str(first), f"{first}"}


def test_the_number_of_a_process_set_may_come_after_the_prefix():
    """Horovod numbers a process set when it is added."""
    late = SimpleNamespace(process_set_id=None)
    prefix = Prefix(late)
    late.process_set_id = 5
    assert str(prefix) == "hvd_accordion.5.0"


def test_after_a_gathering_names_start_again_in_the_order_of_first_collectives(monkeypatch):
    """A rank that was there calls its collectives as one does that has just come."""
    monkeypatch.setattr(naming, "_generation", 0)
    first, second = Prefix(ALL), Prefix(ALL)
    assert [str(first), str(second)] == ["hvd_accordion.0.0", "hvd_accordion.0.1"]
    naming.gathered()
    assert [str(second), str(first), str(second)] == ["hvd_accordion.0.0", "hvd_accordion.0.1", "hvd_accordion.0.0"]

"""Process sets of some of the ranks, which Horovod registers when it starts, and only for the tests that ask for them.

Not `process_sets="dynamic"`: Horovod's thread then keeps a lock while it waits for the other ranks, which every new
collective needs as well, and now and then one takes a hundred times as long.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest

from hvd_accordion.comm.launchers import launched


def registered(hvd: ModuleType, session: pytest.Session) -> dict[str, Any]:
    """Starts Horovod with `first`, rank 0 alone, and `others`, all ranks but 0, if a test has an argument of that name."""
    size = launched(os.environ).size
    asked = {name for item in session.items for name in item.fixturenames}
    found = {"first": hvd.ProcessSet([0]), "others": hvd.ProcessSet(range(1, size))}
    if size < 3:
        del found["others"]
    found = {name: found[name] for name in found if name in asked}
    hvd.init(process_sets=list(found.values()))
    return {"others": hvd.global_process_set, **found}

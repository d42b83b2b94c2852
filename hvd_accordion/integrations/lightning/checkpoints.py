"""Each rank's compression state, such as residuals, in a file beside the checkpoint.

The checkpoint itself is written by rank 0, as without Horovod. A random mark, new at each save, shows whether the files
belong together.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from glob import escape, glob
from typing import Any

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.lightning import ranks
from hvd_accordion.torch.reports import STATE

ENTRY = "hvd_accordion_ranks"  # key in the checkpoint


def file_of(path: Any, rank: int) -> str:
    """Returns the file of a rank beside a checkpoint. Symbolic links are resolved."""
    return f"{os.path.realpath(path) if os.path.islink(path) else os.fspath(path)}.rank{rank}"


def split_own_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Marks the checkpoint and returns this rank's state, None if there is none. A collective call."""
    own = [state.get(STATE) for state in checkpoint.get("optimizer_states", [])]
    if hvd.size() == 1 or not any(own):
        return None
    mark = ranks.broadcast_object(uuid.uuid4().hex)
    checkpoint[ENTRY] = {"mark": mark, "size": hvd.size()}
    return {"mark": mark, "states": own}


def restore_own_state(checkpoint: dict[str, Any], path: Any, read: Callable[[str], Mapping[str, Any]]) -> None:
    """Replaces rank 0's state in the checkpoint by this rank's. A collective call.

    Warns if a rank's file is missing or belongs to another save. That rank gets the shared state, and its residuals start
    at zero.
    """
    entry = checkpoint.get(ENTRY)
    if entry is None:
        return
    missing = False
    if 0 < hvd.rank() < entry["size"]:
        try:
            own = read(file_of(path, hvd.rank()))
        except FileNotFoundError:
            own = {}
        missing = own.get("mark") != entry["mark"]
        if not missing:
            for state, mine in zip(checkpoint["optimizer_states"], own["states"], strict=True):
                if mine is not None:
                    state[STATE] = mine
    without = [rank for rank, lacks in enumerate(ranks.gather_object(missing, "missing")) if lacks]
    if without and hvd.rank() == 0:
        warnings.warn(
            f"ranks {', '.join(map(str, without))} have no state saved with {path} (expected in "
            f"{file_of(path, without[0])} and so on): their residuals start at zero",
            stacklevel=2,
        )


def files_of_all_ranks(path: Any) -> list[str]:
    """Returns the files beside a checkpoint that exist on this host."""
    return glob(f"{escape(os.fspath(path))}.rank*")

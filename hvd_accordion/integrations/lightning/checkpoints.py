"""A file for each rank beside a checkpoint: what its own compression remembers, such as residuals.

The checkpoint itself is rank 0's, as without Horovod. A mark that is drawn at each save tells whether both belong
together.
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

KEPT = "hvd_accordion_ranks"  # our entry in a checkpoint


def beside(path: Any, rank: int) -> str:
    """The file of a rank; of a link's, that of the file that it leads to."""
    return f"{os.path.realpath(path) if os.path.islink(path) else os.fspath(path)}.rank{rank}"


def parted(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Marks the checkpoint and gives what this rank keeps beside it; None where there is nothing. All ranks together."""
    own = [state.get(STATE) for state in checkpoint.get("optimizer_states", [])]
    if hvd.size() == 1 or not any(own):
        return None
    mark = ranks.from_rank(uuid.uuid4().hex)
    checkpoint[KEPT] = {"mark": mark, "size": hvd.size()}
    return {"mark": mark, "states": own}


def joined(checkpoint: dict[str, Any], path: Any, read: Callable[[str], Mapping[str, Any]]) -> None:
    """Puts what this rank kept in the place of rank 0's. All ranks together.

    Warns of ranks whose file is missing or of another save: they take part in all that ranks share, and their
    residuals start at zero.
    """
    kept = checkpoint.get(KEPT)
    if kept is None:
        return
    lacks = False
    if 0 < hvd.rank() < kept["size"]:
        try:
            own = read(beside(path, hvd.rank()))
        except FileNotFoundError:
            own = {}
        lacks = own.get("mark") != kept["mark"]
        if not lacks:
            for state, mine in zip(checkpoint["optimizer_states"], own["states"], strict=True):
                if mine is not None:
                    state[STATE] = mine
    without = [rank for rank, lacking in enumerate(ranks.everywhere(lacks, "lacks")) if lacking]
    if without and hvd.rank() == 0:
        warnings.warn(
            f"of ranks {', '.join(map(str, without))} there is no state that was saved with {path}, looked for in "
            f"{beside(path, without[0])} and the like: their residuals start at zero",
            stacklevel=2,
        )


def of_all_ranks(path: Any) -> list[str]:
    """The files beside a checkpoint that this host can see."""
    return glob(f"{escape(os.fspath(path))}.rank*")

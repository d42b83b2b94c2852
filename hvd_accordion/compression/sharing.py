"""Sharing: whether what is kept of a layer is equal on all ranks or a rank's own. All else follows from that."""

from __future__ import annotations

import enum


class Sharing(enum.Enum):
    """Whose a kept tensor is.

    SHARED: equal on all ranks. Any rank's file has it, a broadcast gives everyone the root's.
    OWN: each rank's own, whatever the number of ranks: a local momentum.
    PART: each rank's own part of a mean over the ranks, as the residual is.

    What is a rank's own (OWN, PART) is in that rank's file alone; another rank's is not taken up but starts anew. A
    broadcast leaves it. After a change of the number of ranks PART is multiplied by new/old, so that it counts for as much
    in the mean; SHARED and OWN stay as they are. What a lost rank held is lost, and a new rank starts anew.
    """

    SHARED = "shared"
    OWN = "own"
    PART = "part"


RESIDUAL = Sharing.PART


def scale(sharing: Sharing, saved: tuple[int, int], now: tuple[int, int]) -> float | None:
    """What a tensor is multiplied with that was kept at another place; None if it starts anew.

    Args:
        saved, now: the rank that kept it and the number of ranks then, and those of now.
    """
    if sharing is Sharing.SHARED:
        return 1.0
    (rank, old), (mine, new) = saved, now
    if rank != mine:
        return None
    return new / old if sharing is Sharing.PART else 1.0

"""What local steps remember: saved, taken up again, and given to all ranks by one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvd_accordion.torch.broadcasting import broadcast_tree
from hvd_accordion.torch.exchange import state
from hvd_accordion.torch.exchange.agreement import any_rank
from hvd_accordion.torch.local_steps.engine import LocalEngine
from hvd_accordion.training import resume


def saved(engine: LocalEngine) -> dict[str, Any]:
    parts = [{**part.state_dict(), "exchange": state.saved(part.engine)} for part in engine.fragments]
    return {"training": engine.training.state_dict(), "fragments": parts, "buffer_bytes": engine.buffer_bytes}


def load(engine: LocalEngine, saved_state: Mapping[str, Any] | None) -> None:
    """Takes up saved state; None: nothing was saved. Other fragments than those of now start anew, with a warning."""
    theirs = [] if saved_state is None else saved_state.get("fragments", [])
    if saved_state is None or not _fits(engine, theirs):
        for part in engine.fragments:
            part.forget()
        if saved_state is not None:
            resume.warn_of(["anchors and residuals of local steps, which are not of these fragments"], stacklevel=4)
        return
    engine.training.load_state_dict(saved_state["training"])
    engine.steps = engine.training.begun
    engine.buffer_bytes = float(saved_state["buffer_bytes"])
    for part, its in zip(engine.fragments, theirs, strict=True):
        part.forget()
        state.load(part.engine, its["exchange"])
        part.load_state_dict(its)


def _fits(engine: LocalEngine, saved_parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each fragment has all parameters of its saved anchors, in their shapes."""
    if len(saved_parts) != len(engine.fragments):
        return False
    pairs = [
        (part.params, saved_part["anchor"]) for part, saved_part in zip(engine.fragments, saved_parts, strict=True)
    ]
    return all(
        name in params and x.shape == params[name].shape for params, anchor in pairs for name, x in anchor.items()
    )


def broadcast(engine: LocalEngine, root_rank: int) -> None:
    """Gives every rank the anchors, counts and levels of `root_rank`; residuals stay where they are.

    Between two steps. Where that rank has made none, every rank's next step begins with its parameters of then.

    Raises ValueError, on every rank the same, where an exchange is under way on some of the ranks.
    """
    transport = engine.transport
    if not engine.active or transport.size == 1:
        return
    pending = [part.pending is not None for part in engine.fragments]
    if any_rank(any(pending), f"{engine.prefix}.pending", transport):
        if any_rank(not any(pending), f"{engine.prefix}.idle", transport):
            raise ValueError(
                "broadcast_optimizer_state: an exchange of local steps is under way on some ranks alone; call end_round() "
                "first"
            )
        for part in engine.fragments:
            part.finish()
    root = list(transport.ranks).index(root_rank)
    theirs = saved(engine)
    for part in theirs["fragments"]:
        part.pop("exchange")
    theirs = broadcast_tree(theirs, root, f"{engine.prefix}.local", transport)
    engine.training.load_state_dict(theirs["training"])
    engine.steps = engine.training.begun
    for part, its in zip(engine.fragments, theirs["fragments"], strict=True):
        part.forget()
        part.load_state_dict(its)
        state.broadcast(part.engine, root_rank)

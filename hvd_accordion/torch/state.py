"""What an optimizer's compression remembers: saved, taken up again, and brought into line among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.torch.eclk import ErrorCompensated
from hvd_accordion.torch.engine import Engine


def saved(engine: Engine) -> dict[str, Any]:
    return {
        "rank": engine.rank,
        "size": engine.size,
        "controller": engine.controller.state_dict(),
        "residual": dict(engine.residual),
        "memory": {name: dict(memory) for name, memory in engine.memory.items() if memory},
        "summed": dict(engine.watch.summed),
        "summed_whole": dict(engine.whole.summed),
        "accumulated": engine.sums.state_dict(),
    }


def load(engine: Engine, state: Mapping[str, Any]) -> None:
    """Takes up saved state. A residual is its rank's own: saved by another rank, it is not taken.

    After a change of the number of ranks it is scaled by new/old, so that it counts for as much in the mean. Sums of
    other entries than an Accordion's `norm` asks for now are not taken. Micro-batches under way are taken from
    whichever rank saved them: all must have as many.
    """
    params = engine.params
    whole = state.get("summed_whole", {})  # neither is in files of older versions
    accumulated = state.get("accumulated", {"count": 0, "sums": {}})
    parts = (state["residual"], state["memory"], state["summed"], whole, accumulated["sums"])
    unknown = sorted({name for part in parts for name in part} - params.keys())
    if unknown:
        raise ValueError(f"state_dict holds compression state of unknown parameters: {', '.join(unknown)}")
    engine.join()
    engine.controller.load_state_dict(state["controller"])

    def own(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(params[name].device, copy=True)

    engine.memory = {n: {key: own(n, x) for key, x in kept.items()} for n, kept in state["memory"].items()}
    engine.watch.load(state["summed"], params)
    engine.whole.load(whole, params)
    engine.sums.load_state_dict(accumulated, params)
    engine.residual = {}
    if state["rank"] == engine.rank:
        scale = engine.size / state["size"]
        engine.residual = {name: own(name, x).mul_(scale) for name, x in state["residual"].items()}
    engine.reset()
    engine.replan()


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Gives every rank the optimizer state of `root_rank`: Horovod's part, and regimes, factors and counts.

    Residuals stay where they are: they are each rank's own. So is all of an ECLK's state, of which nothing is sent.
    """
    if isinstance(optimizer, ErrorCompensated):
        return
    hvd.broadcast_optimizer_state(optimizer, root_rank, model)
    engine = getattr(optimizer, "_hvd", None)
    if isinstance(engine, Engine) and engine.active and engine.size > 1:
        mine = {key: part for key, part in saved(engine).items() if key != "residual"}
        shared = hvd.broadcast_object(mine, root_rank, name=f"{engine.prefix}.state", process_set=engine.process_set)
        own = {"rank": engine.rank, "size": engine.size, "residual": engine.residual}
        if engine.sums.count == shared["accumulated"]["count"]:  # its own micro-batches are as good, and resume exactly
            own["accumulated"] = mine["accumulated"]
        load(engine, {**shared, **own})

"""Horovod's broadcast_optimizer_state, which also brings the ranks' compression state into line."""

from __future__ import annotations

import horovod.torch as hvd
import torch

from hvd_accordion.torch.engine import Engine


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Gives every rank the optimizer state of `root_rank`: Horovod's part, and regimes, factors and counts.

    Residuals stay where they are: they are each rank's own.
    """
    hvd.broadcast_optimizer_state(optimizer, root_rank, model)
    engine = getattr(optimizer, "_hvd", None)
    if isinstance(engine, Engine) and engine.active and engine.size > 1:
        mine = {key: part for key, part in engine.state_dict().items() if key != "residual"}
        shared = hvd.broadcast_object(mine, root_rank, name=f"{engine.prefix}.state", process_set=engine.process_set)
        engine.load_state_dict({**shared, "rank": engine.rank, "size": engine.size, "residual": engine.residual})

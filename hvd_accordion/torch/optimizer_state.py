"""broadcast_optimizer_state: Horovod's, with what compression shares."""

from __future__ import annotations

import torch

from hvd_accordion.torch import horovod_takeover
from hvd_accordion.torch.exchange import state
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.local_steps import state as local_state
from hvd_accordion.torch.local_steps.engine import LocalEngine
from hvd_accordion.torch.optim.compressed_momentum import CompressedMomentum
from hvd_accordion.torch.optim.error_compensated import ErrorCompensated


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Gives every rank the optimizer state of `root_rank`: Horovod's part, and regimes, factors and counts.

    With local steps also the common parameters and the outer optimizer's state.

    Residuals stay where they are: they are each rank's own. So is all of an ECLK's state, of which nothing is sent.
    """
    if isinstance(optimizer, ErrorCompensated):
        return
    if isinstance(optimizer, CompressedMomentum):
        optimizer.broadcast(root_rank)
        return
    horovod_takeover.broadcast_optimizer_state(optimizer, root_rank, model)
    engine = getattr(optimizer, "_hvd", None)
    if isinstance(engine, Engine) and engine.active and engine.size > 1:
        state.broadcast(engine, root_rank)
    elif isinstance(engine, LocalEngine):
        local_state.broadcast(engine, root_rank)

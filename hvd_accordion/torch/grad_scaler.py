"""What GradScaler must not do to an optimizer of this package. Reads callers' frames: a scaler leaves no other trace."""

from __future__ import annotations

import sys
from typing import Any

import torch


def refuse_scaler() -> None:
    """ValueError where a GradScaler steps before a batch is complete: its scale may change while sums hold the old one."""
    frame: Any = sys._getframe(1)
    for _ in range(5):  # past step() itself and what schedulers wrap around it
        frame = frame.f_back if frame is not None else None
        if frame is not None and isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            raise ValueError(
                "GradScaler.step() before the batch is complete: unscale, step and update the scaler only if "
                "optimizer.completes_batch, else call optimizer.step()"
            )

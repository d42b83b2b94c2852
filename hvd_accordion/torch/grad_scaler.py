"""GradScaler and the optimizers of this package: what it must not do, and what it leaves to a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def refuse_scaler() -> None:
    """ValueError where a GradScaler steps before a batch is complete: its scale may change while sums hold the old one.

    Reads callers' frames: a scaler leaves no other trace.
    """
    frame: Any = sys._getframe(1)
    for _ in range(5):  # past step() itself and what schedulers wrap around it
        frame = frame.f_back if frame is not None else None
        if frame is not None and isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            raise ValueError(
                "GradScaler.step() before the batch is complete: unscale, step and update the scaler only if "
                "optimizer.completes_batch, else call optimizer.step()"
            )


@contextmanager
def scaled_back(optimizer: Any) -> Iterator[bool]:
    """What GradScaler leaves to optimizers with `_step_supports_amp_scaling`: gradients are divided by its scale.

    Yields whether they are finite, so that the optimizer is to step. A fused optimizer does all of this by itself.
    """
    given = vars(optimizer)
    if "found_inf" not in given or "_step_supports_amp_scaling" in given:
        yield True
        return
    found, scale = given.pop("found_inf"), given.pop("grad_scale", None)  # other optimizers do not know them
    is_finite = not found.item()
    if is_finite and scale is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, scale.item())
    try:
        yield is_finite
    finally:
        given.update(found_inf=found, grad_scale=scale)

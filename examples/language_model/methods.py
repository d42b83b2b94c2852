"""The ways to train that are compared: an optimizer, what travels between the ranks, and how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_accordion import Accordion, PowerSGD, TopK


@dataclass(frozen=True)
class Method:
    optimizer: str  # "AdamW", or "Muon": for the blocks' matrices, with AdamW elsewhere
    sends: str  # in words, for tables
    compression: Callable[[], Any] = lambda: None  # a new one for each training: a policy has a state
    local_steps: Callable[[], Any] = lambda: None

    def __str__(self) -> str:
        return f"{self.optimizer}: {self.sends}"


DENSE, DENSE_MUON = "adamw", "muon"
METHODS = {
    DENSE: Method("AdamW", "dense gradients"),
    "adamw-powersgd4": Method("AdamW", "PowerSGD(4)", lambda: PowerSGD(4)),
    "adamw-topk1": Method("AdamW", "TopK(0.01)", lambda: TopK(0.01)),
    "adamw-accordion": Method("AdamW", "Accordion()", lambda: Accordion(interval=100, unit="steps")),
    DENSE_MUON: Method("Muon", "dense gradients"),
    "muon-powersgd16": Method("Muon", "PowerSGD(16)", lambda: PowerSGD(16)),
    "muon-powersgd4": Method("Muon", "PowerSGD(4)", lambda: PowerSGD(4)),
}
DEMO = (DENSE, "adamw-powersgd4", DENSE_MUON)  # what is compared by default

"""The ways to train that are compared: an optimizer, what travels between the ranks, and how often."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_accordion import QSGD, Accordion, AccordionSteps, EFSignSGD, LocalSteps, PowerSGD, TopK


@dataclass(frozen=True)
class Method:
    """The factories make new objects for each training: policies have a state.

    That of local steps gets a function, from a momentum to what makes an outer optimizer of it: SGD at the rate 1.
    """

    optimizer: str  # "AdamW", "OneBitAdam", or "Muon": for the blocks' matrices, with AdamW elsewhere
    sends: str  # in words, for tables
    compression: Callable[[], Any] = lambda: None
    local_steps: Callable[[Callable[[float], Any]], Any] = lambda outer: None

    def __str__(self) -> str:
        return f"{self.optimizer}: {self.sends}"


def dense(optimizer: str) -> Method:
    return Method(optimizer, "dense gradients")


def gradients(optimizer: str, compression: Any, sends: str | None = None) -> Method:
    return Method(optimizer, sends or str(compression), lambda: copy.deepcopy(compression))


def local(optimizer: str, every: int, compression: Any = None, momentum: float = 0.0) -> Method:
    """The parameters' change each `every` steps."""
    sends = f"{'changes' if compression is None else compression} each {every} steps"
    if momentum:
        sends += f", outer momentum {momentum:g}"
        return Method(optimizer, sends, lambda: compression, lambda outer: LocalSteps(every, outer(momentum)))
    return Method(optimizer, sends, lambda: compression, lambda outer: LocalSteps(every))


def by_accordion(optimizer: str, critical: int, relaxed: int, compression: Any = None) -> Method:
    """The parameters' change each `critical` or `relaxed` steps."""
    sends = f"{'changes' if compression is None else compression} each {critical} or {relaxed} steps, by Accordion"

    def local_steps(_: Any) -> LocalSteps:
        return LocalSteps(AccordionSteps(critical, relaxed, interval=WINDOW, unit="steps"))

    return Method(optimizer, sends, lambda: compression, local_steps)


WINDOW = 100  # steps from check to check of Accordion's rule
SIGNS = EFSignSGD()
DENSE, DENSE_MUON = "adamw", "muon"
METHODS = {
    DENSE: dense("AdamW"),
    "adamw-powersgd4": gradients("AdamW", PowerSGD(4)),
    "adamw-topk1": gradients("AdamW", TopK(0.01)),
    "adamw-accordion": gradients("AdamW", Accordion(interval=WINDOW, unit="steps"), "Accordion()"),
    "adamw-local5": local("AdamW", 5),
    "adamw-local20": local("AdamW", 20),
    "adamw-local20-momentum": local("AdamW", 20, momentum=0.5),
    "adamw-local20-sign": local("AdamW", 20, SIGNS),
    "onebit-adam": Method("OneBitAdam", "signs of momentum after dense steps"),
    DENSE_MUON: dense("Muon"),
    "muon-powersgd16": gradients("Muon", PowerSGD(16)),
    "muon-powersgd4": gradients("Muon", PowerSGD(4)),
    **{f"muon-local{every}": local("Muon", every) for every in (5, 20, 50)},
    **{f"muon-local{every}-sign": local("Muon", every, SIGNS) for every in (5, 20, 50)},
    "muon-local5-topk5": local("Muon", 5, TopK(0.05)),
    "muon-local20-qsgd1": local("Muon", 20, QSGD(levels=1)),
    "muon-local20-qsgd1-16": local("Muon", 20, QSGD(levels=1, bucket_size=16)),
    "muon-accordion-local": by_accordion("Muon", 5, 20),
    "muon-accordion-local-sign": by_accordion("Muon", 5, 20, SIGNS),
}
DEMO = (DENSE, "adamw-powersgd4", DENSE_MUON, "muon-local20-sign")  # what is compared by default

"""What a step of a typical network would take on a measured link, dense and compressed. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hvd_accordion.cli.findings import Finding, Verdict, table
from hvd_accordion.compression import CompressionSpec, Dense, PowerSGD, TopK
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import Layer
from hvd_accordion.policy.auto import Advice, Auto, Calibration, advise

CANDIDATES = (PowerSGD(4), TopK(0.01))
PARAMETERS = 11_173_962  # ResNet-18's, as it is used on CIFAR-10
PARAMETERS_ALLOWED = (10_000, 200_000_000)  # beyond, a layer's rehearsal takes gigabytes
BACKWARD_SECONDS = 0.1
PAYS = 1.05  # a step so many times as fast; less is within what such measurements scatter

Choices = Mapping[str, Sequence[CompressionSpec]]


def layers(parameters: int = PARAMETERS) -> list[Layer]:
    """Those of a ResNet-18 (He et al. 2016; on CIFAR-10) as wide as makes about so many parameters, in forward order."""
    return resnet18(min(range(1, 300), key=lambda width: abs(size_of(resnet18(width)) - parameters)))


def size_of(its: Sequence[Layer]) -> int:
    return sum(x.numel for x in its)


def resnet18(width: int) -> list[Layer]:
    """Of which the first stage has so many channels, 64 in the paper."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def convolution(name: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes.append((f"{name}.weight", (outputs, inputs, kernel, kernel)))
        shapes.extend((f"{name}.norm.{part}", (outputs,)) for part in ("weight", "bias"))

    convolution("first", width, 3, 3)
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
        for block in (1, 2):
            convolution(f"stage{stage}.{block}.conv1", outputs, inputs, 3)
            convolution(f"stage{stage}.{block}.conv2", outputs, outputs, 3)
            if inputs != outputs:
                convolution(f"stage{stage}.{block}.short", outputs, inputs, 1)
            inputs = outputs
    shapes += [("last.weight", (10, inputs)), ("last.bias", (10,))]
    return [Layer(name, shape, "float32") for name, shape in shapes]


def choices(its: Sequence[Layer], world_size: int) -> dict[str, tuple[CompressionSpec, ...]]:
    """Layer name -> the candidates that may compress it."""
    found = {x.name: assignment.choices(x, Auto(CANDIDATES), world_size) for x in its}
    return {name: specs for name, specs in found.items() if specs}


def ready(its: Sequence[Layer], backward: float) -> dict[str, float]:
    """Seconds into backward when each gradient is there: one after another at even steps, the last layer first.

    A ResNet's convolutions cost about the same each: what halves in height and width doubles in inputs and outputs.
    """
    last = max(1, len(its) - 1)
    return {x.name: backward * i / last for i, x in enumerate(reversed(its))}


def predicted(its: Sequence[Layer], measured: Calibration, backward: float) -> Advice:
    """What each candidate would cost where all hides behind a backward pass of so many seconds that can; 0: nothing."""
    timed = replace(measured, ready=ready(its, backward))
    return advise(its, choices(its, measured.world_size), timed)


def prediction(its: Sequence[Layer], hidden: Advice, bare: Advice) -> str:
    """A row for dense and for each candidate: milliseconds that a step takes beyond its own computing, and of what."""
    n = bare.measured.world_size
    rows: list[tuple[str, ...]] = [
        ("compression", "ms a step more", "if nothing hides", "ms of compression", "MB sent per rank")
    ]
    for spec in (Dense(), *(s for s in CANDIDATES if str(s) in bare.step)):
        taken = [spec if spec in row.costs else Dense() for row in bare]
        sent = sum(s.bytes_per_step(x.shape, x.dtype, n) for x, s in zip(its, taken, strict=True))
        work = sum(row.costs[s].compression for row, s in zip(bare, taken, strict=True))
        times = (f"{1e3 * seconds:,.1f}" for seconds in (hidden.step[str(spec)], bare.step[str(spec)], work))
        rows.append((str(spec), *times, f"{sent / 1e6:,.2f}"))
    return table(rows)


def verdict(hidden: Advice, bare: Advice, backward: float) -> Finding:
    """Whether compression makes backward and exchange together at least PAYS times as fast as dense.

    How much hides behind backward, ranks that compute nothing can't see: on a CPU whose cores all compute, next to nothing.
    """
    (best, faster, times), (best_bare, faster_bare, times_bare) = (_best(x, backward) for x in (hidden, bare))
    if faster >= PAYS:
        return Finding(Verdict.OK, "compression", f"would pay: {best} takes {times}, {faster:.1f} times as fast")
    if faster_bare >= PAYS:
        found = f"would pay only where little hides behind backward: {best_bare} then takes {times_bare}"
        return Finding(
            Verdict.NOTE, "compression", found, "compression=Auto() sees how much does, and chooses by layer"
        )
    advice = "leave compression=None; Auto() finds that out for each network by itself"
    return Finding(Verdict.NOTE, "compression", f"would not pay here: {best} takes {times}", advice)


def _best(advice: Advice, backward: float) -> tuple[str, float, str]:
    """The best candidate, how many times as fast as dense it is, and both in words."""
    steps = {str(spec): advice.step.get(str(spec), math.inf) for spec in CANDIDATES}
    best = min(steps, key=lambda name: steps[name])
    mine, dense = (backward + seconds for seconds in (steps[best], advice.step[str(Dense())]))
    return (
        best,
        dense / mine if mine else 1.0,
        f"{1e3 * mine:,.0f} ms for backward and exchange, dense {1e3 * dense:,.0f} ms",
    )

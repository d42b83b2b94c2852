"""Predicts the step time of a reference network on a measured link, dense and compressed. All functions are pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hvd_accordion.cli.findings import Finding, Verdict, table
from hvd_accordion.compression import CompressionSpec, Dense, PowerSGD, TopK
from hvd_accordion.policy import assignment
from hvd_accordion.policy.auto import Advice, Auto, Calibration, advise
from hvd_accordion.policy.layers import Layer

CANDIDATES = (PowerSGD(4), TopK(0.01))
PARAMETERS = 11_173_962  # of ResNet-18 on CIFAR-10
PARAMETERS_ALLOWED = (10_000, 200_000_000)  # beyond, measuring the compression of one layer takes gigabytes
BACKWARD_SECONDS = 0.1
MIN_SPEEDUP = 1.05  # a smaller speed-up is within the noise of the measurement

Choices = Mapping[str, Sequence[CompressionSpec]]


def layers(parameters: int = PARAMETERS) -> list[Layer]:
    """Returns the layers of a ResNet-18 (He et al. 2016; on CIFAR-10) in forward order.

    The width is chosen such that the network has about this number of parameters.
    """
    return resnet18(min(range(1, 300), key=lambda width: abs(size_of(resnet18(width)) - parameters)))


def size_of(network: Sequence[Layer]) -> int:
    """Returns the number of parameters."""
    return sum(x.numel for x in network)


def resnet18(width: int) -> list[Layer]:
    """Returns the layers of a ResNet-18 whose first stage has `width` channels, 64 in the paper."""
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


def choices(network: Sequence[Layer], world_size: int) -> dict[str, tuple[CompressionSpec, ...]]:
    """Returns the candidates that can compress each layer, by layer name."""
    found = {x.name: assignment.auto_specs(x, Auto(CANDIDATES), world_size) for x in network}
    return {name: specs for name, specs in found.items() if specs}


def ready_times(network: Sequence[Layer], backward: float) -> dict[str, float]:
    """Returns the seconds after the start of backward when each gradient is complete.

    The times are evenly spaced, from the last layer to the first, because the convolutions of a ResNet cost about the same
    each. From stage to stage height and width halve, and the numbers of input and output channels double.
    """
    last = max(1, len(network) - 1)
    return {x.name: backward * i / last for i, x in enumerate(reversed(network))}


def predict(network: Sequence[Layer], measured: Calibration, backward: float) -> Advice:
    """Predicts the cost of each candidate if communication fully overlaps with `backward` seconds of computation."""
    timed = replace(measured, ready=ready_times(network, backward))
    return advise(network, choices(network, measured.world_size), timed)


def prediction_table(network: Sequence[Layer], overlapped: Advice, exposed: Advice) -> str:
    """Formats the prediction, with a row for dense and each candidate.

    Args:
        network: the layers.
        overlapped: the prediction for full overlap with backward.
        exposed: the prediction without overlap.
    """
    n = exposed.measured.world_size
    rows: list[tuple[str, ...]] = [
        ("compression", "ms added to a step", "without overlap", "ms of compression", "MB sent per rank")
    ]
    for spec in (Dense(), *(s for s in CANDIDATES if str(s) in exposed.step)):
        chosen = [spec if spec in row.costs else Dense() for row in exposed]
        sent = sum(s.bytes_per_step(x.shape, x.dtype, n) for x, s in zip(network, chosen, strict=True))
        work = sum(row.costs[s].compression for row, s in zip(exposed, chosen, strict=True))
        times = (f"{1e3 * seconds:,.1f}" for seconds in (overlapped.step[str(spec)], exposed.step[str(spec)], work))
        rows.append((str(spec), *times, f"{sent / 1e6:,.2f}"))
    return table(rows)


def verdict(overlapped: Advice, exposed: Advice, backward: float) -> Finding:
    """Judges whether compression makes backward and exchange at least MIN_SPEEDUP times as fast as dense.

    Idle ranks cannot measure how much communication overlaps with backward. On a CPU whose cores all compute, it is almost
    none.
    """
    best, speedup, times = _best(overlapped, backward)
    if speedup >= MIN_SPEEDUP:
        return Finding(Verdict.OK, "compression", f"would be faster: {best} takes {times}, {speedup:.1f} times as fast")
    best_exposed, speedup_exposed, times_exposed = _best(exposed, backward)
    if speedup_exposed >= MIN_SPEEDUP:
        found = f"would be faster only with little overlap: {best_exposed} then takes {times_exposed}"
        advice = "compression=Auto() measures the overlap and chooses for each layer"
        return Finding(Verdict.NOTE, "compression", found, advice)
    advice = "keep compression=None; Auto() decides this for each network"
    return Finding(Verdict.NOTE, "compression", f"would not be faster here: {best} takes {times}", advice)


def _best(advice: Advice, backward: float) -> tuple[str, float, str]:
    """Returns the best candidate, its speed-up over dense, and both times as text."""
    steps = {str(spec): advice.step.get(str(spec), math.inf) for spec in CANDIDATES}
    best = min(steps, key=lambda name: steps[name])
    compressed, dense = (backward + seconds for seconds in (steps[best], advice.step[str(Dense())]))
    return (
        best,
        dense / compressed if compressed else 1.0,
        f"{1e3 * compressed:,.0f} ms for backward and exchange, dense {1e3 * dense:,.0f} ms",
    )

"""What a step of a typical network would take on a measured link, dense and compressed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hvd_accordion import plan
from hvd_accordion.auto import Advice, Auto, Measured, advise
from hvd_accordion.command_line.findings import Finding, Verdict, table
from hvd_accordion.compression import CompressionSpec, Dense, PowerSGD, TopK
from hvd_accordion.plan import Layer

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
    found = {x.name: plan.choices(x, Auto(CANDIDATES), world_size) for x in its}
    return {name: specs for name, specs in found.items() if specs}


def ready(its: Sequence[Layer], backward: float) -> dict[str, float]:
    """Seconds into backward when each gradient is there: one after another at even steps, the last layer first.

    A ResNet's convolutions cost about the same each: what halves in height and width doubles in inputs and outputs.
    """
    last = max(1, len(its) - 1)
    return {x.name: backward * i / last for i, x in enumerate(reversed(its))}


def predicted(its: Sequence[Layer], measured: Measured, backward: float) -> Advice:
    """What each candidate would cost where nothing but the computing hides what travels (auto.predicted)."""
    timed = replace(measured, ready=ready(its, backward))
    return advise(its, choices(its, measured.world_size), timed)


def prediction(its: Sequence[Layer], advice: Advice) -> str:
    """A row for dense and for each candidate: milliseconds that a step takes beyond its own computing, and of what."""
    n = advice.measured.world_size
    rows = [("compression", "ms a step more", "ms of compression", "MB sent per rank")]
    for spec in (Dense(), *CANDIDATES):
        taken = [spec if spec in row.costs else Dense() for row in advice]
        sent = sum(s.bytes_per_step(x.shape, x.dtype, n) for x, s in zip(its, taken, strict=True))
        work = sum(row.costs[s].compression for row, s in zip(advice, taken, strict=True))
        if str(spec) in advice.step:
            rows.append((str(spec), f"{1e3 * advice.step[str(spec)]:,.1f}", f"{1e3 * work:,.1f}", f"{sent / 1e6:,.2f}"))
    return table(rows)


def verdict(advice: Advice, backward: float) -> Finding:
    """Whether the best candidate makes backward and exchange together at least PAYS times as fast as dense."""
    dense = advice.step[str(Dense())]
    steps = {spec: advice.step[str(spec)] for spec in CANDIDATES if str(spec) in advice.step}
    best = min(steps, key=lambda spec: steps[spec], default=None)
    if best is None:
        return Finding(Verdict.NOTE, "compression", "would not pay: every tensor of this network is too small for it")
    faster = (backward + dense) / (backward + steps[best]) if backward + steps[best] else 1.0
    times = (
        f"{1e3 * (backward + steps[best]):,.0f} ms for backward and exchange, dense {1e3 * (backward + dense):,.0f} ms"
    )
    if faster >= PAYS:
        return Finding(Verdict.OK, "compression", f"would pay: {best} takes {times}, {faster:.1f} times as fast")
    advice_text = "compression=None is the fastest; Auto() comes to the same for each network by itself"
    return Finding(Verdict.NOTE, "compression", f"would not pay here: {best} takes {times}", advice_text)

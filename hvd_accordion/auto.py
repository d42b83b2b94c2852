"""Auto: dense or compressed, per layer, by the time that each is predicted to take on this link and this machine.

Policy only: floats, names and shapes. Who measures is the framework's engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hvd_accordion.collectives import AllReduce
from hvd_accordion.compression import CompressionSpec, Dense, PowerSGD
from hvd_accordion.cost import Link, constant, layer_seconds, round_seconds

PROBE_STEPS = 3  # steps that travel dense before the choice; the first warms up, the others time backward


@dataclass(frozen=True)
class Auto:
    """For each layer dense or one of `candidates`, whichever is predicted to make the step shorter.

    The first three steps travel dense. Then the ranks measure the link (dense allreduces of different sizes) and the
    machine (each candidate on each shape of gradient, without the network), and all choose alike, by rank 0's numbers:
    what is sent dense may hide behind backward, the time of compressing can't (see `predicted`). Under an Accordion it
    may be the relaxed side. `optimizer.advice()` tells what was measured and what each choice would cost.

    Args:
        candidates: lossy specs to choose from, besides `Dense()`.
    """

    candidates: tuple[CompressionSpec, ...] = (PowerSGD(4),)

    def __post_init__(self) -> None:
        if isinstance(self.candidates, CompressionSpec):
            object.__setattr__(self, "candidates", (self.candidates,))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        wrong = [c for c in self.candidates if not isinstance(c, CompressionSpec)]
        if wrong:
            raise TypeError(f"candidates must be compression specs such as PowerSGD(4), got {wrong[0]!r}")
        if not self.candidates:
            raise ValueError("candidates must hold at least one spec such as PowerSGD(4), got ()")

    def __str__(self) -> str:
        return f"Auto({', '.join(map(str, self.candidates))})"


class Layer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Measured:
    """What the choice rests on, equal on all ranks."""

    link: Link
    world_size: int
    backward: float  # seconds from the first gradient of a step to its last: what dense exchanges may hide behind
    compression: Mapping[tuple[str, CompressionSpec], float]  # seconds of a layer's exchange without the network


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer under a spec: its bytes on the link, its compression, the latency of its group's rounds."""

    wire: float
    compression: float
    latency: float


@dataclass(frozen=True)
class LayerAdvice:
    """One layer: its cost under dense and under each candidate that may have it, and what was chosen."""

    name: str
    shape: tuple[int, ...]
    costs: Mapping[CompressionSpec, Cost]
    chosen: CompressionSpec


@dataclass(frozen=True)
class Advice(Sequence[LayerAdvice]):
    """What was measured and what each choice would cost; prints as a table.

    `step` has the predicted cost of a step, beyond its own computing, of `Dense()`, each candidate and the choice itself
    ("chosen").
    """

    measured: Measured
    layers: tuple[LayerAdvice, ...]
    step: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerAdvice]:
        return iter(self.layers)

    @property
    def compresses(self) -> bool:
        return any(layer.chosen.lossy for layer in self.layers)

    def __str__(self) -> str:
        m = self.measured
        alone = constant(AllReduce, m.world_size, m.link)
        lines = [
            f"link of {m.world_size} ranks: {8e-6 * m.link.bandwidth:,.0f} Mbit/s, {1e3 * alone:.2f} ms a collective",
            f"backward, which hides what travels meanwhile: {1e3 * m.backward:.1f} ms",
            "predicted cost of a step: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.step.items()),
        ]
        specs = list(dict.fromkeys(spec for layer in self.layers for spec in layer.costs))
        rows = [("ms on the link + in compression", "shape", *map(str, specs), "chosen")]
        for layer in self.layers:
            costs = [layer.costs.get(spec) for spec in specs]
            cells = ["-" if c is None else f"{1e3 * c.wire:.2f} + {1e3 * c.compression:.2f}" for c in costs]
            rows.append((layer.name, "x".join(map(str, layer.shape)) or "scalar", *cells, str(layer.chosen)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            "Compression pays on this link."
            if self.compresses
            else "This link needs no compression: everything travels dense."
        )
        return "\n".join(lines)


def advice_of(engine: Any) -> Advice:
    """What the engine's Auto came to. ValueError where there is none, or where it has not chosen yet."""
    advice = getattr(engine, "advice", None)
    if advice is None:
        raise ValueError(
            "advice needs compression=Auto() (alone, in a dict, or as an Accordion's relaxed side), two ranks or more, and "
            f"the first steps done ({PROBE_STEPS} in torch)"
        )
    return advice


def cost(layer: Layer, spec: CompressionSpec, measured: Measured) -> Cost:
    n, link = measured.world_size, measured.link
    wire = layer_seconds(layer.shape, layer.dtype, spec, n, link)
    return Cost(wire, measured.compression.get((layer.name, spec), 0.0), round_seconds(spec, n, link, layer.dtype))


def predicted(costs: Iterable[Cost], backward: float) -> float:
    """Seconds that a step takes beyond its own computing: Gamma + max(C - W, 0) + L.

    Gamma: compression, in the thread that computes. C: all bytes on the link, of which the backward pass hides W. L: the
    latency of one group's rounds, the last's, which nothing hides; all others' are hidden by backward or by the bytes.
    """
    costs = list(costs)
    gamma, wire = sum(c.compression for c in costs), sum(c.wire for c in costs)
    return gamma + max(wire - backward, 0.0) + max((c.latency for c in costs), default=0.0)


def choose(
    layers: Sequence[Layer], allowed: Mapping[str, Sequence[CompressionSpec]], measured: Measured
) -> dict[str, CompressionSpec]:
    """Layer name -> the spec of the cheapest of these choices.

    For each candidate, from nothing compressed on as well as from the best choice so far: one layer more at a time, those
    first that save the most on the link for their time of compression.

    Args:
        layers: all that are exchanged; those without an entry in `allowed` travel dense, but their bytes count.
        allowed: layer name -> candidates that may have it.
    """
    nothing: dict[str, CompressionSpec] = {x.name: Dense() for x in layers}
    best, least = nothing, predicted([cost(x, Dense(), measured) for x in layers], measured.backward)
    for spec in specs_of(allowed):
        mine = {x.name: cost(x, spec, measured) for x in layers if spec in allowed.get(x.name, ())}
        for start in (nothing, best):
            choice, costs = dict(start), {x.name: cost(x, start[x.name], measured) for x in layers}
            gains = {name: _gain(costs[name], c) for name, c in mine.items()}
            for name in sorted(mine, key=gains.__getitem__, reverse=True):
                choice[name], costs[name] = spec, mine[name]
                total = predicted(costs.values(), measured.backward)
                if total < least:
                    best, least = dict(choice), total
    return best


def _gain(now: Cost, then: Cost) -> float:
    """Seconds that are saved on the link for one more of compression."""
    return (now.wire - then.wire) / max(then.compression - now.compression, 1e-9)


def specs_of(allowed: Mapping[str, Sequence[CompressionSpec]]) -> list[CompressionSpec]:
    return list(dict.fromkeys(spec for specs in allowed.values() for spec in specs))


def advise(
    layers: Sequence[Layer], allowed: Mapping[str, Sequence[CompressionSpec]], measured: Measured
) -> Advice:
    """The choice, and what it and its alternatives would cost."""
    chosen = choose(layers, allowed, measured)
    rows = []
    for x in layers:
        costs = {spec: cost(x, spec, measured) for spec in (Dense(), *allowed.get(x.name, ()))}
        rows.append(LayerAdvice(x.name, x.shape, costs, chosen[x.name]))
    choices = {str(spec): dict.fromkeys(allowed, spec) for spec in (Dense(), *specs_of(allowed))} | {"chosen": chosen}
    step = {
        name: predicted((row.costs.get(choice.get(row.name), row.costs[Dense()]) for row in rows), measured.backward)
        for name, choice in choices.items()
    }
    return Advice(measured, tuple(rows), step)

"""Auto: dense or compressed, per layer, by the time that each is predicted to take on this link and this machine.

Policy only: floats, names and shapes. Who measures is the framework's engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.compression import CompressionSpec, Dense, PowerSGD
from hvd_accordion.policy.cost_model import Link, constant, layer_seconds, round_seconds
from hvd_accordion.policy.protocol import Policy

PROBE_STEPS = 3  # steps that travel dense before the choice; the first warms up, the others time backward


@dataclass(frozen=True)
class Auto(Policy):
    """For each layer dense or one of `candidates`, whichever is predicted to make the step shorter.

    The first three steps travel dense. Then the ranks measure the link (dense allreduces of different sizes) and the
    machine (each candidate on each shape of gradient, without the network), and all choose alike, by rank 0's numbers:
    what travels may hide behind backward, the time of compressing can't (see `predicted`). Under an Accordion it
    may be the relaxed side. `optimizer.advice()` tells what was measured and what each choice would cost.

    Args:
        candidates: lossy specs to choose from, besides `Dense()`.
    """

    candidates: tuple[CompressionSpec, ...] = (PowerSGD(4),)
    _chosen: ClassVar[Mapping[str, CompressionSpec]]  # of an object: layer name -> spec, by resolve()

    def __post_init__(self) -> None:
        if isinstance(self.candidates, CompressionSpec):
            object.__setattr__(self, "candidates", (self.candidates,))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        wrong = [c for c in self.candidates if not isinstance(c, CompressionSpec)]
        if wrong:
            raise TypeError(f"candidates must be compression specs such as PowerSGD(4), got {wrong[0]!r}")
        if not self.candidates:
            raise ValueError("candidates must hold at least one spec such as PowerSGD(4), got ()")
        object.__setattr__(self, "_chosen", {})

    def __str__(self) -> str:
        return f"Auto({', '.join(map(str, self.candidates))})"

    def specs(self, layer: str) -> Sequence[CompressionSpec]:
        """What was chosen for the layer; Dense() before."""
        return (self.choose(layer, 0, 0),)

    def choose(self, layer: str, step: int, epoch: int) -> CompressionSpec:
        del step, epoch
        return self._chosen.get(layer, Dense())

    def resolve(self, chosen: Mapping[str, CompressionSpec]) -> None:
        object.__setattr__(self, "_chosen", dict(chosen))


class Layer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Calibration:
    """What the choice rests on, equal on all ranks."""

    link: Link
    world_size: int
    ready: Mapping[str, float]  # seconds from a step's first gradient to the layer's; nothing known of it: 0
    compression: Mapping[tuple[str, CompressionSpec], float]  # seconds of a layer's exchange without the network

    def ready_at(self, layer: Layer) -> float:
        return self.ready.get(layer.name, 0.0)


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
    ready: float
    costs: Mapping[CompressionSpec, Cost]
    chosen: CompressionSpec


@dataclass(frozen=True)
class Advice(Sequence[LayerAdvice]):
    """What was measured and what each choice would cost; prints as a table.

    `step` has the predicted cost of a step, beyond its own computing, of `Dense()`, each candidate and the choice itself
    ("chosen").
    """

    measured: Calibration
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
            f"backward, which hides what travels meanwhile: {1e3 * max(m.ready.values(), default=0.0):.1f} ms",
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
    advice: Advice | None = getattr(engine, "advice", None)
    if advice is None:
        raise ValueError(
            "advice needs compression=Auto() (alone, in a dict, or as an Accordion's relaxed side), two ranks or more, and "
            f"the first steps done ({PROBE_STEPS} in torch)"
        )
    return advice


def cost(layer: Layer, spec: CompressionSpec, measured: Calibration) -> Cost:
    n, link = measured.world_size, measured.link
    wire = layer_seconds(layer.shape, layer.dtype, spec, n, link)
    return Cost(wire, measured.compression.get((layer.name, spec), 0.0), round_seconds(spec, n, link, layer.dtype))


def predicted(layers: Iterable[tuple[float, Cost]]) -> float:
    """Seconds that a step takes beyond its own computing.

    Gradients get ready at r_1 <= ... <= r_n, seconds into backward, and r_n ends it. Compression is in the thread that
    computes: after i layers it has taken S_i. The link has carried layer i at F_i = max(F_{i-1}, r_i + S_i) + wire_i. The
    step is longer by max(F_n, r_n + S_n) - r_n + L, with L the latency of the longest rounds: those of the last group
    nothing hides.

    Args:
        layers: r_i and the cost of each, in the order of r_i.
    """
    ready = spent = free = wait = 0.0
    for ready, cost in layers:
        spent += cost.compression
        free = max(free, ready + spent) + cost.wire
        wait = max(wait, cost.latency)
    return max(free, ready + spent) - ready + wait


def choose(
    layers: Sequence[Layer], allowed: Mapping[str, Sequence[CompressionSpec]], measured: Calibration
) -> dict[str, CompressionSpec]:
    """Layer name -> spec, so that the predicted step is short.

    At a price of a second on the link, in seconds of compression, each layer has a cheapest spec. The best of the choices
    that come of all prices, from nothing compressed up, and then what changes of one layer at a time make of it.

    Args:
        layers: all that are exchanged; those without an entry in `allowed` travel dense, but their bytes count.
        allowed: layer name -> candidates that may have it.
    """
    order = sorted(reversed(layers), key=measured.ready_at)  # of equals the last first, as backward has them
    ready = [measured.ready_at(x) for x in order]
    costs = [{spec: cost(x, spec, measured) for spec in (Dense(), *allowed.get(x.name, ()))} for x in order]

    def total(choice: Sequence[CompressionSpec]) -> float:
        return predicted((r, its[spec]) for r, its, spec in zip(ready, costs, choice, strict=True))

    def at(price: float) -> list[CompressionSpec]:
        return [min(its, key=lambda spec: its[spec].compression + price * its[spec].wire) for its in costs]

    pairs = [(a, b) for its in costs for a, b in itertools.permutations(its.values(), 2) if a.wire > b.wire]
    turns = {max(0.0, (b.compression - a.compression) / (a.wire - b.wire)) * (1 + 1e-9) for a, b in pairs}
    best = min((at(price) for price in sorted({0.0, *turns})), key=total)
    least, better = total(best), True
    while better:
        better = False
        for i, its in enumerate(costs):
            for spec in its:
                choice = [*best[:i], spec, *best[i + 1 :]]
                if (now := total(choice)) < least:
                    best, least, better = choice, now, True
    chosen = {x.name: spec for x, spec in zip(order, best, strict=True)}
    return {x.name: chosen[x.name] for x in layers}


def specs_of(allowed: Mapping[str, Sequence[CompressionSpec]]) -> list[CompressionSpec]:
    return list(dict.fromkeys(spec for specs in allowed.values() for spec in specs))


def advise(layers: Sequence[Layer], allowed: Mapping[str, Sequence[CompressionSpec]], measured: Calibration) -> Advice:
    """The choice, and what it and its alternatives would cost."""
    chosen = choose(layers, allowed, measured)
    rows = []
    for x in layers:
        costs = {spec: cost(x, spec, measured) for spec in (Dense(), *allowed.get(x.name, ()))}
        rows.append(LayerAdvice(x.name, x.shape, measured.ready_at(x), costs, chosen[x.name]))
    order = sorted(reversed(rows), key=lambda row: row.ready)
    choices = {str(spec): dict.fromkeys(chosen, spec) for spec in (Dense(), *specs_of(allowed))} | {"chosen": chosen}
    step = {
        name: predicted((row.ready, row.costs.get(choice[row.name], row.costs[Dense()])) for row in order)
        for name, choice in choices.items()
    }
    return Advice(measured, tuple(rows), step)

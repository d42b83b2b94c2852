"""Which layer gets which compression, in which group, in which order: pure functions of names, shapes and settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeAlias

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.compression.base import ITEMSIZE, size
from hvd_accordion.policy.accordion import Accordion
from hvd_accordion.policy.auto import Auto

Policy: TypeAlias = CompressionSpec | Accordion | Auto
Chosen: TypeAlias = Mapping[str, CompressionSpec]  # by an Auto: layer name -> spec
Compression: TypeAlias = Policy | Mapping[str, Policy | None] | None

MIN_NUMEL = 1024  # smaller tensors travel dense: their compressed form saves less than its handling costs
NOTHING: Chosen = MappingProxyType({})
DENSE_BUCKET_BYTES = 2 * 2**20  # of what has but one round, and is large on the link: it should start early
BUCKET_BYTES = 16 * 2**20  # one group's gradients: large enough for few collectives, small enough to start early


@dataclass(frozen=True)
class Layer:
    """One parameter tensor, as all ranks must know it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def numel(self) -> int:
        return size(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Group:
    """Layers that are exchanged together: one spec, one dtype, one device, all with a residual or all without."""

    name: str
    spec: CompressionSpec
    layers: tuple[Layer, ...]
    has_residual: bool


@dataclass(frozen=True)
class SwitchableGroup:
    """Layers that are exchanged together in a traced graph, which holds an exchange for each of `specs`."""

    name: str
    specs: tuple[CompressionSpec, ...]
    layers: tuple[Layer, ...]

    @property
    def has_residual(self) -> bool:
        return any(spec.lossy and spec.error_feedback for spec in self.specs)


def is_policy(value: Any) -> bool:
    return isinstance(value, CompressionSpec | Accordion | Auto)


def assign(compression: Compression, names: Sequence[str], strict: bool = True) -> dict[str, Policy]:
    """Layer name -> spec or Accordion. In a dict of globs the first that matches counts; no match means dense.

    TypeError for anything that is no spec, ValueError (where `strict`) for a glob that matches no layer.
    """
    if compression is None:
        compression = Dense()
    if is_policy(compression):
        return dict.fromkeys(names, compression)  # type: ignore[arg-type]
    if not isinstance(compression, Mapping):
        raise TypeError(
            "compression must be None, hvd.Compression.none or fp16, a spec such as PowerSGD(4), an Accordion, an Auto, "
            f"or a dict from parameter-name glob to one of those, got {compression!r}"
        )
    for glob, policy in compression.items():
        if not isinstance(glob, str):
            raise TypeError(f"compression: a key must be a glob of parameter names (a string), got {glob!r}")
        if policy is not None and not is_policy(policy):
            raise TypeError(f"compression[{glob!r}] must be None, a spec, an Accordion or an Auto, got {policy!r}")
        if strict and not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"compression: the glob {glob!r} matches no parameter name; they are {', '.join(names)}")
    chosen: dict[str, Policy] = {}
    for name in names:
        policy = next((p for glob, p in compression.items() if fnmatchcase(name, glob)), None)
        chosen[name] = Dense() if policy is None else policy
    return chosen


def allowed(layer: Layer, spec: CompressionSpec, world_size: int, min_numel: int = MIN_NUMEL) -> bool:
    """Whether the spec may compress the layer: not if that is 1-D, small, or would not get smaller on the wire."""
    return (
        len(layer.shape) > 1
        and layer.numel >= min_numel
        and spec.lossy
        and spec.shrinks(layer.shape, layer.dtype, world_size)
    )


def sides(policy: Policy) -> tuple[CompressionSpec | Auto, ...]:
    """What the layer's regimes lead to, critical before relaxed."""
    return (policy.critical, policy.relaxed) if isinstance(policy, Accordion) else (policy,)


def has_auto(policy: Policy) -> bool:
    return any(isinstance(side, Auto) for side in sides(policy))


def options(policy: Policy) -> list[CompressionSpec]:
    """Every spec that a layer may get of this policy, whatever the layer."""
    return [s for side in sides(policy) for s in (side.candidates if isinstance(side, Auto) else (side,))]


def memory_keys(policy: Policy) -> set[str]:
    """What any spec of this policy may keep of a layer."""
    return {key for spec in options(policy) for key in spec.memory_keys}


def settled(layer: Layer, side: CompressionSpec | Auto, chosen: Chosen) -> CompressionSpec:
    """The spec itself; of an Auto what it chose, dense as long as it has not."""
    return chosen.get(layer.name, Dense()) if isinstance(side, Auto) else side


def level(
    layer: Layer,
    policy: Policy,
    step: int,
    world_size: int,
    min_numel: int = MIN_NUMEL,
    chosen: Chosen = NOTHING,
) -> CompressionSpec:
    """The spec that the layer travels under at this step."""
    side = policy.spec(layer.name) if isinstance(policy, Accordion) else policy
    spec = settled(layer, side, chosen)
    return spec if spec.active(step) and allowed(layer, spec, world_size, min_numel) else Dense()


def candidates(
    layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL, chosen: Chosen = NOTHING
) -> list[CompressionSpec]:
    """Every spec that the layer may ever travel under: first those that its regimes lead to, critical before relaxed."""
    specs = [settled(layer, side, chosen) for side in sides(policy)]
    found = [spec if allowed(layer, spec, world_size, min_numel) else Dense() for spec in specs]
    if any(not spec.active(0) for spec in found):
        found.append(Dense())
    return list(dict.fromkeys(found))


def choices(layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL) -> tuple[CompressionSpec, ...]:
    """The candidates of the layer's Auto that may compress it; none where there is no Auto."""
    autos = [side for side in sides(policy) if isinstance(side, Auto)]
    return tuple(s for auto in autos for s in auto.candidates if allowed(layer, s, world_size, min_numel))


def adaptive(layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL) -> bool:
    """Whether the layer's regime makes any difference to it."""
    return isinstance(policy, Accordion) and any(allowed(layer, s, world_size, min_numel) for s in options(policy))


def buckets(layers: Sequence[Layer], limit: int | None = BUCKET_BYTES) -> list[list[Layer]]:
    """The layers cut into runs of at most `limit` bytes, in the order given; None: one run."""
    runs: list[list[Layer]] = []
    filled = 0
    for layer in layers:
        if not runs or (limit is not None and filled + layer.nbytes > limit):
            runs.append([])
            filled = 0
        runs[-1].append(layer)
        filled += layer.nbytes
    return runs


def split(layers: Sequence[Layer], parts: int) -> list[list[Layer]]:
    """The layers in `parts` runs of nearly equal count, the last layer first (Horovod's `groups=N`)."""
    backward = list(reversed(layers))
    parts = min(parts, len(backward))
    small, more = divmod(len(backward), max(1, parts))
    runs, start = [], 0
    for i in range(parts):
        end = start + small + (i < more)
        runs.append(backward[start:end])
        start = end
    return runs


def grouped(
    runs: Sequence[Sequence[Layer]],
    specs: Mapping[str, CompressionSpec],
    carried: Collection[str] = (),
    limit: int | None = None,
) -> list[Group]:
    """Each run cut up by what its layers have in common, and into buckets, under names that are the same on every rank.

    Layers in `carried` hold a residual; they stay apart from those that need none.
    """
    groups = []
    for i, run in enumerate(runs):
        kinds: dict[tuple[CompressionSpec, str, str, bool], list[Layer]] = {}
        for layer in run:
            spec = specs[layer.name]
            has_residual = layer.name in carried or (spec.lossy and spec.error_feedback)
            kinds.setdefault((spec, layer.dtype, layer.device, has_residual), []).append(layer)
        for j, ((spec, dtype, _, has_residual), members) in enumerate(kinds.items()):
            small = limit if limit is None or spec.lossy else min(limit, DENSE_BUCKET_BYTES)
            for k, bucket in enumerate(buckets(members, small)):
                groups.append(Group(f"{i}.{j}.{k}.{spec.tag}.{dtype}", spec, tuple(bucket), has_residual))
    return groups


def parts(
    runs: Sequence[Sequence[Layer]],
    policy: Mapping[str, Policy],
    world_size: int,
    min_numel: int = MIN_NUMEL,
    limit: int | None = None,
    chosen: Chosen = NOTHING,
) -> list[SwitchableGroup]:
    """Each run cut up like `grouped`, for levels that change without a new plan: an adaptive layer stays alone."""
    found = []
    for i, run in enumerate(runs):
        kinds: dict[tuple[tuple[CompressionSpec, ...], str, str, str], list[Layer]] = {}
        for layer in run:
            specs = tuple(candidates(layer, policy[layer.name], world_size, min_numel, chosen))
            alone = layer.name if adaptive(layer, policy[layer.name], world_size, min_numel) else ""
            kinds.setdefault((specs, layer.dtype, layer.device, alone), []).append(layer)
        for j, ((specs, dtype, _, _), members) in enumerate(kinds.items()):
            for k, bucket in enumerate(buckets(members, limit)):
                found.append(SwitchableGroup(f"{i}.{j}.{k}.{dtype}", specs, tuple(bucket)))
    return found

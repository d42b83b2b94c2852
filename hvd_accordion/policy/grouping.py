"""Which layers are exchanged together: pure functions of names, shapes and specs, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy.assignment import MIN_NUMEL, adaptive, reachable_specs
from hvd_accordion.policy.layers import Group, Layer, SwitchableGroup
from hvd_accordion.policy.protocol import Policy

DENSE_BUCKET_BYTES = 2 * 2**20  # bucket limit for dense gradients: one round, many bytes, so start early
BUCKET_BYTES = 16 * 2**20  # one group's gradients: large enough for few collectives, small enough to start early


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
) -> list[SwitchableGroup]:
    """Each run cut up like `grouped`, for levels that change without a new plan: an adaptive layer stays alone."""
    found = []
    for i, run in enumerate(runs):
        kinds: dict[tuple[tuple[CompressionSpec, ...], str, str, str], list[Layer]] = {}
        for layer in run:
            specs = tuple(reachable_specs(layer, policy[layer.name], world_size, min_numel))
            alone = layer.name if adaptive(layer, policy[layer.name], world_size, min_numel) else ""
            kinds.setdefault((specs, layer.dtype, layer.device, alone), []).append(layer)
        for j, ((specs, dtype, _, _), members) in enumerate(kinds.items()):
            for k, bucket in enumerate(buckets(members, limit)):
                found.append(SwitchableGroup(f"{i}.{j}.{k}.{dtype}", specs, tuple(bucket)))
    return found

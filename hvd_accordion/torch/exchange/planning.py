"""Which layers an update exchanges, and in which groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy import grouping
from hvd_accordion.policy.layers import Group, Layer
from hvd_accordion.torch.exchange.micro_batches import Kind, kind


@dataclass(frozen=True)
class Plan:
    """Of the updates between two changes of levels or layers.

    Args:
        names: of the layers, in the order of the parameters.
        groups: of those that are dense, in the order of backward.
        kinds: layer name -> shape, dtype and device that its gradients must have.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    kinds: Mapping[str, Kind]

    @cached_property
    def group_of(self) -> dict[str, Group]:
        return {layer.name: group for group in self.groups for layer in group.layers}

    def extended(self, more: Plan) -> Plan:
        """With groups of layers that turned out to be dense; their names are other than those that there are."""
        prefix = f"late.{len(self.groups)}"
        late = tuple(replace(group, name=f"{prefix}.{group.name}") for group in more.groups)
        return Plan(self.names, self.groups + late, {**self.kinds, **more.kinds})


def plan(
    names: Sequence[str],
    dense: Sequence[Layer],
    params: Mapping[str, torch.Tensor],
    specs: Mapping[str, CompressionSpec],
    residual: Collection[str],
    groups: Any,
) -> Plan:
    """A plan for these layers.

    Args:
        dense: those that are known to have dense gradients.
        residual: layers that hold one.
        groups: as Horovod's.
    """
    limit = None if groups else grouping.BUCKET_BYTES
    grouped = grouping.grouped(_runs(dense, params, groups), specs, residual, limit)
    return Plan(tuple(names), tuple(grouped), {x.name: kind(params[x.name]) for x in dense})


def _runs(layers: Sequence[Layer], params: Mapping[str, torch.Tensor], groups: Any) -> list[list[Layer]]:
    if isinstance(groups, int) and groups > 0:
        return grouping.split(layers, groups)
    if isinstance(groups, list):
        by_id = {id(params[x.name]): x for x in layers}
        runs = [[by_id.pop(id(p)) for p in group if id(p) in by_id] for group in groups]
        return [run for run in runs if run] + [[x] for x in by_id.values()]
    return [list(layers[::-1])]  # in the order of backward

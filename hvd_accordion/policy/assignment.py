"""Which layer gets which compression: pure functions of names, shapes and policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import Policy, is_policy, policy_of

Compression: TypeAlias = CompressionSpec | Policy | Mapping[str, CompressionSpec | Policy | None] | None

MIN_NUMEL = 1024  # smaller tensors travel dense: their compressed form saves less than its handling costs


def assign(compression: Compression, names: Sequence[str], strict: bool = True) -> dict[str, Policy]:
    """Layer name -> policy. In a dict of globs the first that matches counts; no match means dense.

    TypeError for anything that is neither spec nor policy, ValueError (where `strict`) for a glob that matches no layer.
    """
    if compression is None:
        compression = Dense()
    if is_policy(compression):
        return dict.fromkeys(names, policy_of(compression))  # type: ignore[arg-type]
    if not isinstance(compression, Mapping):
        raise TypeError(
            "compression must be None, hvd.Compression.none or fp16, a spec such as PowerSGD(4), an Accordion, an Auto, "
            f"another Policy, or a dict from parameter-name glob to one of those, got {compression!r}"
        )
    for glob, policy in compression.items():
        if not isinstance(glob, str):
            raise TypeError(f"compression: a key must be a glob of parameter names (a string), got {glob!r}")
        if policy is not None and not is_policy(policy):
            raise TypeError(
                f"compression[{glob!r}] must be None, a spec, an Accordion, an Auto or another Policy, got {policy!r}"
            )
        if strict and not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"compression: the glob {glob!r} matches no parameter name; they are {', '.join(names)}")
    policies = [(glob, policy_of(Dense() if policy is None else policy)) for glob, policy in compression.items()]
    unmatched = policy_of(Dense())
    return {name: next((p for glob, p in policies if fnmatchcase(name, glob)), unmatched) for name in names}


def is_compressible(layer: Layer, spec: CompressionSpec, world_size: int, min_numel: int = MIN_NUMEL) -> bool:
    """Whether the spec may compress the layer: not if that is 1-D, small, or would not get smaller on the wire."""
    return (
        len(layer.shape) > 1
        and layer.numel >= min_numel
        and spec.lossy
        and spec.shrinks(layer.shape, layer.dtype, world_size)
    )


def all_specs(layer: str, policy: Policy) -> list[CompressionSpec]:
    """Every spec that a layer of this name may get of this policy, whatever its shape."""
    return list(dict.fromkeys([*policy.specs(layer), *policy.candidates]))


def memory_sharing(layer: str, policy: Policy) -> dict[str, Sharing]:
    """What any spec of this policy may keep of the layer, and whose that is. ValueError where its specs disagree."""
    found: dict[str, Sharing] = {}
    for spec in all_specs(layer, policy):
        for key, sharing in spec.memory_sharing.items():
            if found.setdefault(key, sharing) is not sharing:
                raise ValueError(f"{policy!r}: its specs declare {key!r} as {found[key].value} and as {sharing.value}")
    return found


def level(
    layer: Layer, policy: Policy, step: int, world_size: int, min_numel: int = MIN_NUMEL, epoch: int = 0
) -> CompressionSpec:
    """The spec that the layer travels under at this step. ValueError if the policy chooses what it has not announced."""
    spec, specs = policy.choose(layer.name, step, epoch), policy.specs(layer.name)
    if spec not in specs:
        raise ValueError(
            f"{policy!r}: choose({layer.name!r}, {step}, {epoch}) must return one of specs({layer.name!r}), "
            f"{', '.join(map(repr, specs))}, got {spec!r}"
        )
    return spec if spec.active(step) and is_compressible(layer, spec, world_size, min_numel) else Dense()


def reachable_specs(layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL) -> list[CompressionSpec]:
    """Every spec that the layer may travel under from now on, in the policy's order."""
    specs = policy.specs(layer.name)
    found = [spec if is_compressible(layer, spec, world_size, min_numel) else Dense() for spec in specs]
    if any(not spec.active(0) for spec in found):
        found.append(Dense())
    return list(dict.fromkeys(found))


def auto_specs(
    layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL
) -> tuple[CompressionSpec, ...]:
    """The policy's candidates that may compress the layer; none where nothing is to be measured."""
    return tuple(spec for spec in policy.candidates if is_compressible(layer, spec, world_size, min_numel))


def adaptive(layer: Layer, policy: Policy, world_size: int, min_numel: int = MIN_NUMEL) -> bool:
    """Whether the policy may change the layer's spec from step to step."""
    changes = policy.window is not None or len(policy.specs(layer.name)) > 1
    return changes and any(
        is_compressible(layer, spec, world_size, min_numel) for spec in all_specs(layer.name, policy)
    )

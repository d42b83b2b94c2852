"""The controller's memory as text, for a variable: what a checkpoint holds beside numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_accordion.policy.layers import Layer
from hvd_accordion.training import resume


def written(state: Mapping[str, Any], layers: Sequence[Layer]) -> bytes:
    """`Controller.state_dict` of a training with these layers, in the order of their numbers."""
    return json.dumps({**state, "layers": {layer.name: layer.shape for layer in layers}}).encode()


def read(journal: bytes, layers: Sequence[Layer]) -> dict[str, Any]:
    """The state that `written` was given, under the names of today's layers.

    A layer is known by its number and shape, as in the variables beside: names that Keras makes up differ from process to
    process. What fits no layer of today keeps a name of its own.
    """
    state = json.loads(journal)
    saved = state.pop("layers", None)
    if saved is None:  # of an older version: by names
        return state
    today = {layer.name for layer in layers}
    names = {old: old if old not in today else f"{old} (as saved)" for old in saved}
    for (old, shape), layer in zip(saved.items(), layers, strict=False):
        if tuple(shape) == layer.shape:
            names[old] = layer.name
    return renamed(state, lambda name: names.get(name, name))


def renamed(state: Mapping[str, Any], name_of: Callable[[str], str]) -> dict[str, Any]:
    def keys(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name_of(name): value for name, value in named.items()}

    def policy(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {key: keys(part) if isinstance(part, dict) else part for key, part in saved.items()}

    policies = [{"kind": mine.kind, "state": policy(mine.state)} for mine in resume.saved_policies(state)]
    rest = {key: part for key, part in state.items() if key != "accordions"}
    return {**rest, "policies": policies, "chosen": keys(state["chosen"])}

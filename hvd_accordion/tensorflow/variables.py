"""Names and shapes of the variables whose gradients are exchanged, tf.Variable and keras.Variable alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion import checks
from hvd_accordion.plan import Layer


def value_of(variable: Any) -> Any:
    """The tf.Variable in a keras.Variable; a tf.Variable itself."""
    return variable if isinstance(variable, tf.Variable) else getattr(variable, "value", variable)


def name_of(variable: Any) -> str:
    """ "dense/kernel" for a Keras variable, "w" for a tf.Variable named "w:0"."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def names_of(variables: Sequence[Any], taken: Sequence[str] = ()) -> list[str]:
    """A name for each; where one stands twice the later ones are numbered."""
    seen, names = set(taken), []
    for variable in variables:
        base = name = name_of(variable)
        count = 0
        while name in seen:
            count += 1
            name = f"{base}_{count}"
        seen.add(name)
        names.append(name)
    return names


def layer_of(name: str, variable: Any) -> Layer:
    dtype = tf.as_dtype(variable.dtype).name
    return Layer(name, tuple(variable.shape), dtype, value_of(variable).device)


def check_groups(groups: Any) -> None:
    """ValueError or TypeError unless it is None, an integer >= 0 or a list of lists of variables."""
    if groups is None:
        return
    if not isinstance(groups, list):
        checks.integer("groups", groups, 0)
        return
    members = [v for group in groups for v in group]
    if any(not hasattr(v, "assign") for v in members):
        raise ValueError("groups should be a non-negative integer or a list of list of tf.Variable.")
    if len({id(v) for v in members}) != len(members):
        raise ValueError("A variable can only appear once in groups.")

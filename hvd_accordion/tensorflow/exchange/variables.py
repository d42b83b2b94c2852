"""Names and shapes of the variables whose gradients are exchanged, tf.Variable and keras.Variable alike."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.transport import ProcessSet, is_initialized
from hvd_accordion.utils import validation


def value_of(variable: Any) -> Any:
    """The tf.Variable in a keras.Variable; a tf.Variable itself."""
    return variable if isinstance(variable, tf.Variable) else getattr(variable, "value", variable)


def path_of(variable: Any) -> str:
    if hasattr(variable, "path"):
        return variable.path
    try:
        return variable.name.split(":")[0]
    except AttributeError:  # an eager tensor has no name
        return "source"


def names_of(variables: Sequence[Any], taken: Collection[str] = ()) -> list[str]:
    """A name for each: "dense/kernel" of a Keras variable's path, "w" of a tf.Variable named "w:0".

    What all paths begin with is left out: Keras puts the model's name there when the model is made, but not when it is
    loaded. Where a name stands twice the later ones are numbered.
    """
    paths = [path_of(v).split("/") for v in variables]
    common = list(
        itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths), strict=False))
    )
    seen, names = set(taken), []
    for path in paths:
        base = name = "/".join(path[len(common) :])
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


def trainable_of(local_layers: Any) -> list[Any]:
    """The trainable weights of a layer or of several. ValueError for what is no layer."""
    layers = [] if local_layers is None else local_layers
    layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers)
    if not all(isinstance(layer, keras.layers.Layer) for layer in layers):
        raise ValueError("All local layers must be of tf.keras.layers.Layer type.")
    return [v for layer in layers for v in layer.trainable_weights]


def check_gradients(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """ValueError where there are more or fewer than variables, TypeError for those of variables that are no floats."""
    if len(gradients) != len(variables):
        raise ValueError(f"gradients must be as many as variables, got {len(gradients)} for {len(variables)}")
    for g, v in zip(gradients, variables, strict=True):
        if g is not None and not tf.as_dtype(v.dtype).is_floating:
            raise TypeError(f"variables must be of a floating dtype to be exchanged, got {tf.as_dtype(v.dtype).name}")


def divided(gradient: Any, by: int) -> Any:
    """A gradient of any kind over a number."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / by, gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient / by


def check_groups(groups: Any) -> None:
    """ValueError or TypeError unless it is None, an integer >= 0 or a list of lists of variables."""
    if groups is None:
        return
    if not isinstance(groups, list):
        validation.integer("groups", groups, 0)
        return
    members = [v for group in groups for v in group]
    if any(not hasattr(v, "assign") for v in members):
        raise ValueError("groups should be a non-negative integer or a list of list of tf.Variable.")
    if len({id(v) for v in members}) != len(members):
        raise ValueError("A variable can only appear once in groups.")


def check_process_set(process_set: Any) -> None:
    """TypeError for anything else, ValueError for one that is not registered with Horovod."""
    if not isinstance(process_set, ProcessSet):
        raise TypeError(f"process_set must be an hvd.ProcessSet, got {process_set!r}")
    if process_set.process_set_id is None and is_initialized():
        raise ValueError(
            f"process_set must be known to Horovod, by hvd.init(process_sets=[...]) or hvd.add_process_set, got {process_set}"
        )

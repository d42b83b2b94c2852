"""load_model: a saved Keras model with a distributed optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from hvd_accordion.policy.assignment import Compression
from hvd_accordion.tensorflow.keras import copies
from hvd_accordion.tensorflow.keras.compressed_momentum import CompressedMomentum
from hvd_accordion.tensorflow.keras.distributed import Distributed, distributed
from hvd_accordion.tensorflow.keras.optimizer import DistributedOptimizer


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Compression | type = None,
    legacy_opts: bool = False,
    **options: Any,
) -> keras.Model:
    """A saved Keras model whose optimizer averages gradients over the ranks, with all of its state.

    A residual is its rank's own: save and load one file per rank to resume exactly.

    Args:
        filepath: as `keras.models.load_model`'s.
        custom_optimizers: classes of optimizers beside those of Keras.
        custom_objects: as Keras's.
        compression, options: as `DistributedOptimizer`'s.
    """
    del legacy_opts
    classes = [c for c in vars(keras.optimizers).values() if isinstance(c, type)]
    classes = [c for c in classes if issubclass(c, keras.optimizers.Optimizer)] + list(custom_optimizers or ())
    wrapping = DistributedOptimizer(keras.optimizers.SGD(), compression=compression, **options)._hvd_wrapping
    objects = {c.__name__: distributed(c) for c in classes}
    with copies.wrapped(wrapping):
        model = keras.models.load_model(filepath, custom_objects={**objects, **(custom_objects or {})})
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or isinstance(optimizer, Distributed | CompressedMomentum):
        return model
    # saved by Keras's own optimizer: compiled again with the same settings, and its state
    config = keras.saving.deserialize_keras_object(model.get_compile_config())
    model.compile(**{**config, "optimizer": DistributedOptimizer(optimizer, compression=compression, **options)})
    return model

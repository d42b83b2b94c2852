"""DistributedOptimizer of horovod.tensorflow: of Keras optimizers, and of those of TensorFlow 1 as Horovod has it."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.policy.assignment import Compression
from hvd_accordion.tensorflow.transport import Average, HorovodOptimizer, ProcessSet, global_process_set
from hvd_accordion.tensorflow.transport import Compression as HorovodCompression
from hvd_accordion.training.settings import is_horovods


def DistributedOptimizer(
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression | type = None,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    **options: Any,
) -> Any:
    """An optimizer that averages gradients over the ranks, compressed, before it applies them.

    A Keras optimizer is wrapped by `hvd_accordion.tensorflow.keras.DistributedOptimizer`, which see for `compression`
    and for further `options`. A `tf.compat.v1.train.Optimizer` is left to Horovod, which compresses it by
    `hvd.Compression` alone: TypeError for anything else.
    """
    arguments = {
        "name": name,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "sparse_as_dense": sparse_as_dense,
        "backward_passes_per_step": backward_passes_per_step,
        "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "average_aggregated_gradients": average_aggregated_gradients,
        "num_groups": num_groups,
        "groups": groups,
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    if isinstance(optimizer, keras.optimizers.Optimizer):
        from hvd_accordion.tensorflow.keras.optimizer import DistributedOptimizer as of_keras

        return of_keras(optimizer, compression=compression, **arguments, **options)
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise TypeError(f"optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
    if options or not (compression is None or is_horovods(compression)):
        raise TypeError(
            f"compression must be None or one of hvd.Compression for a tf.compat.v1.train.Optimizer, got {compression!r}; "
            "use a Keras optimizer"
        )
    chosen = compression or HorovodCompression.none
    return HorovodOptimizer(optimizer, use_locking=use_locking, compression=chosen, **arguments)

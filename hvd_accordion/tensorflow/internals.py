"""What is not public of Horovod, Keras and TensorFlow, and is read all the same: a new version of theirs may break it.

Besides these functions, `SyncBatchNormalization` overrides `BatchNormalization._moments`, and `scaled_rate` hides
`Optimizer._get_current_learning_rate`, both of Keras.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvd_accordion.tensorflow.transport import Average


class TakenOver(NamedTuple):
    """Settings of Horovod's own DistributedOptimizer: arguments, and whether several passes are averaged, None unknown."""

    arguments: dict[str, Any]
    average: bool | None


def taken_over(optimizer: Any) -> TakenOver:
    """From the variables that the closure of Horovod's DistributedOptimizer for Keras holds."""
    reduce = optimizer._allreduce_grads
    theirs: Mapping[str, Any] = inspect.getclosurevars(getattr(reduce, "python_function", reduce)).nonlocals
    found = {name: theirs[name] for name in ("op", "sparse_as_dense", "groups", "process_set", "compression")}
    found["gradient_predivide_factor"] = theirs["postscale_factor"] if theirs["op"] == Average else 1.0
    found["scale_local_gradients"] = optimizer.scale_local_gradients
    helper = optimizer._agg_helper
    found["backward_passes_per_step"] = 1 if helper is None else helper.backward_passes_per_step
    return TakenOver(found, None if helper is None else helper.average_aggregated_gradients)


def called_by_loss_scale_optimizer() -> bool:
    """Whether the caller's caller is a method of Keras's LossScaleOptimizer."""
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    return caller is not None and isinstance(caller.f_locals.get("self"), keras.optimizers.LossScaleOptimizer)


def refuse_xla() -> None:
    """ValueError where a function is traced to be compiled by XLA: Horovod has no kernels for it here."""
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:  # where it has moved, TensorFlow's own error has to do
        return
    if not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "jit_compile must be False or 'auto', got True: Horovod's collectives can't be compiled by XLA; "
            "leave jit_compile out of tf.function, and in Keras pass model.compile(..., jit_compile=False)"
        )

"""XLA: Horovod has no kernels for it here."""

from __future__ import annotations

import tensorflow as tf


def refuse_xla() -> None:
    """ValueError where a function is traced to be compiled by XLA."""
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:  # not public: where it has moved, TensorFlow's own error has to do
        return
    if not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "jit_compile must be False or 'auto', got True: Horovod's collectives can't be compiled by XLA; "
            "leave jit_compile out of tf.function, and in Keras pass model.compile(..., jit_compile=False)"
        )

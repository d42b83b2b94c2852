"""Variables whose number of rows depends on settings: checkpoints of other settings hold another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.exchange.state import State, variable
from hvd_accordion.training import resume


def initial_memory(specs: Sequence[CompressionSpec], layer: Layer, dtype: tf.DType, seed: int) -> dict[str, tf.Tensor]:
    """What these specs remember of a layer, at the start; where several remember the same, the one with most rows."""
    like = tf.zeros(layer.shape, dtype)
    largest_of: dict[str, tf.Tensor] = {}
    for memory in [spec.initial_memory(ops, like, layer.name, seed) for spec in specs]:
        for part, value in memory.items():
            if part not in largest_of or value.shape[0] > largest_of[part].shape[0]:
                largest_of[part] = value
    return largest_of


class Rows:
    """How many rows each of its variables has under the settings of now."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}  # by the variable's id

    def made(self, value: tf.Tensor, dtype: tf.DType) -> tf.Variable:
        """A variable that a checkpoint may give another number of rows, until `refit`."""
        made = variable(value, dtype, [None, *value.shape[1:]])
        self._of[id(made)] = value.shape[0]
        return made

    def of(self, v: tf.Variable) -> int:
        return self._of[id(v)]

    def read(self, v: tf.Variable) -> tf.Tensor:
        """The value, of a shape that a graph can rely on."""
        return tf.ensure_shape(v.read_value(), [self.of(v), *v.shape[1:]])

    def refit(self, state: State, numbers: Mapping[str, str], fresh: Callable[[str], Mapping[str, Any]]) -> list[str]:
        """Gives what was restored the rows of now; returns of what it took up a part, in words.

        Of memory the rows that both have stay. Sums of other entries start anew.

        Args:
            numbers: of the layers in the state, by their names.
            fresh: the memory of a layer, by its name, at the start.
        """
        cut = []
        for name, key in numbers.items():
            for summed in (state.summed.get(key), state.summed_whole.get(key)):
                if summed is not None and self._other(summed):
                    summed.assign(tf.zeros(self.of(summed), summed.dtype))
            memory = {part: v for part, v in state.memory_of(key).items() if self._other(v)}
            if memory:
                anew = fresh(name)
                for part, v in memory.items():
                    both = v.read_value()[: self.of(v)]
                    v.assign(tf.concat([both, tf.cast(anew[part], v.dtype)[both.shape[0] :]], 0))
                cut.append(name)
        return [f"rows of the memory of {resume.in_words(cut)}, which has another number of them now"] if cut else []

    def _other(self, v: tf.Variable) -> bool:
        return v.read_value().shape[0] != self.of(v)

"""What an exchange of gradients keeps in variables: all that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.training import resume

Arrays = dict[str, np.ndarray]
T = TypeVar("T")

COUNTS = ("step", "step_of_epoch", "updates", "sent_bytes")
SINGLES = (*COUNTS, "passes", "lr_scale", "levels", "measured", "measures_whole")  # equal on all ranks
NEVER = np.iinfo(np.int64).max


class Declared:
    """What specs declare of the memory that is a rank's own. A plain object: a checkpoint has no part in it."""

    def __init__(self) -> None:
        self.sharing: dict[tuple[str, str], Sharing] = {}  # by layer and part
        self.start: Callable[[str], Mapping[str, tf.Tensor]] = lambda key: {}  # a layer's memory at the start

    def is_part(self, key: str, part: str) -> bool:
        return self.sharing[key, part] is Sharing.PART


class State(tf.Module):
    """Variables by the number of their layer, in the order in which they were added.

    All but `residual` and `own` (and their `owner`) are equal on all ranks; see `Sharing` for what follows from that. What
    was restored from another rank, or of another number of ranks, is put right at the next step.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(name="state")
        self.me = (rank, size)
        self.owner = variable([rank, size], tf.int32)
        self.step = variable(0, tf.int64)
        self.step_of_epoch = variable(0, tf.int64)
        self.updates = variable(0, tf.int64)
        self.sent_bytes = variable(0.0, tf.float64)
        self.passes = variable(1, tf.int64)  # micro-batches of a full batch, and what its learning rate is scaled by
        self.lr_scale = variable(1.0, tf.float64)
        self.next_change: tf.Variable | None = None  # the step at which a policy that looks at steps may choose anew
        self.levels = variable(np.zeros(0), tf.int32, [None])  # of each adaptive layer: place among its policy's specs
        self.measured = variable(np.zeros(0), tf.bool, [None])  # whether each policy's gradients are summed now
        self.measures_whole = variable(False, tf.bool)  # whether those of all layers are
        self.journal = variable("", tf.string)  # what the controller knows, as JSON
        self.residual: dict[str, tf.Variable] = {}
        self.memory: dict[str, dict[str, tf.Variable]] = {}  # what specs keep that is equal on all ranks
        self.own: dict[str, dict[str, tf.Variable]] = {}  # what specs keep that is each rank's own
        self.declared = Declared()
        self.summed: dict[str, tf.Variable] = {}  # watched entries of the averaged gradients since the window's start
        self.summed_whole: dict[str, tf.Variable] = {}  # the same of all layers, for the norm of the whole model
        self.slice_bytes: dict[str, tf.Variable] = {}  # of each layer with IndexedSlices, at its last exchange

    def memory_of(self, key: str) -> dict[str, tf.Variable]:
        """All that specs keep of a layer."""
        return {**self.memory.get(key, {}), **self.own.get(key, {})}

    def claim(self) -> None:
        """Makes what was restored this rank's own, or lets it start anew."""
        rank, size = self.me
        owner = self.owner.read_value()

        def take() -> tf.Tensor:
            mine, factor = tf.equal(owner[0], rank), size / tf.cast(owner[1], tf.float64)
            for residual in self.residual.values():
                kept = residual * tf.cast(factor, residual.dtype)
                residual.assign(tf.where(mine, kept, tf.zeros_like(residual)))
            for key, parts in self.own.items():
                start = self.declared.start(key)
                for part, v in parts.items():
                    its = tf.cast(factor, v.dtype) if self.declared.is_part(key, part) else 1.0
                    v.assign(tf.where(mine, v * its, tf.cast(start[part], v.dtype)))
            self.owner.assign(self.me)
            return tf.constant(True)

        tf.cond(tf.reduce_all(tf.equal(owner, self.me)), lambda: tf.constant(False), take)

    def move(self, rank: int, size: int) -> None:
        """This rank at another place among others: what is its own is scaled as `Sharing` says."""
        self.claim()
        self.me = (rank, size)
        self.scale()

    def scale(self) -> None:
        """What this process kept at another place, as `move`."""
        factor = self.me[1] / int(self.owner[1])
        parts = [v for key, own in self.own.items() for part, v in own.items() if self.declared.is_part(key, part)]
        for v in (*self.residual.values(), *parts):
            v.assign(v * tf.cast(factor, v.dtype))
        self.owner.assign(self.me)

    def forget(self, key: str, *kinds: str) -> None:
        """Lets go of what a layer kept, of `kinds` or of all."""
        # a checkpoint can't follow what is taken out of a dict
        for kept in kinds or ("residual", "memory", "own", "summed", "summed_whole"):
            setattr(self, kept, {k: v for k, v in getattr(self, kept).items() if k != key})

    def schedule(self) -> None:
        """Makes `next_change`. Without a policy that looks at steps a checkpoint has no place for it."""
        if self.next_change is None:
            self.next_change = variable(NEVER, tf.int64)

    @property
    def singles(self) -> dict[str, tf.Variable]:
        """Those of no layer that are equal on all ranks, by their names."""
        found = {name: getattr(self, name) for name in SINGLES}
        return found if self.next_change is None else {**found, "next_change": self.next_change}

    def shared(self) -> list[tf.Variable]:
        """Those that are equal on all ranks, but for the journal, which no collective can carry."""
        counts = self.singles.values()
        memory = [v for own in self.memory.values() for v in own.values()]
        return [*counts, *memory, *self.summed.values(), *self.summed_whole.values()]

    def arrays(self) -> Arrays:
        """All of it as numpy arrays, for a file format that takes nothing else."""
        found = {name: v.numpy() for name, v in self._named().items()}
        return {**found, "journal": np.frombuffer(self.journal.numpy(), np.uint8)}

    def load(self, arrays: Mapping[str, Any]) -> list[str]:
        """Takes up saved arrays that fit; a variable that was not saved, or in a shape that it can't have, keeps its value.

        Returns what was saved and is not taken up, in words.
        """
        named, misfits = self._named(), []
        for name, array in arrays.items():
            saved, v = np.asarray(array), named.get(name)
            if v is not None and v.shape.is_compatible_with(saved.shape):
                v.assign(saved)
            elif v is not None or (name.startswith(("residual.", "memory.", "own.")) and saved.any()):
                misfits.append(name)
        if "journal" in arrays:
            self.journal.assign(np.asarray(arrays["journal"]).tobytes())
        return [f"what was kept as {resume.in_words(misfits)}, for which there is no place"] if misfits else []

    def _named(self) -> dict[str, tf.Variable]:
        found = {"owner": self.owner, **self.singles}
        for group in ("residual", "summed", "summed_whole", "slice_bytes"):
            found |= {f"{group}.{key}": v for key, v in getattr(self, group).items()}
        for group in ("memory", "own"):
            found |= {f"{group}.{k}.{part}": v for k, own in getattr(self, group).items() for part, v in own.items()}
        return found


def outside(make: Callable[[], T]) -> T:
    """What `make` returns, run eagerly even while a function is traced.

    In a thread: of a function that it traces again TensorFlow takes no new variables, whatever scope they are made in.
    """
    if tf.executing_eagerly():
        return make()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def rollback(state: State, more: Sequence[tf.Variable]) -> Callable[[], None]:
    """A function that gives the state's variables, and `more`, the values of now; residuals as this rank's place is then."""
    values = {id(v): (v, tf.identity(v.read_value())) for v in [*state.variables, *more]}

    def back() -> None:
        for v in state.residual.values():
            if id(v) not in values:  # made since then
                v.assign(tf.zeros_like(v))
        for key, parts in state.own.items():
            for part, v in parts.items():
                if id(v) not in values:
                    v.assign(tf.cast(state.declared.start(key)[part], v.dtype))
        for v, value in values.values():
            v.assign(value)
        state.scale()

    return back


def wide_dtype(dtype: str) -> tf.DType:
    """What residuals and sums of gradients of this dtype are kept in."""
    return tf.float64 if dtype == "float64" else tf.float32


def variable(value: Any, dtype: tf.DType, shape: Sequence[int | None] | None = None) -> tf.Variable:
    return tf.Variable(
        tf.cast(value, dtype) if dtype != tf.string else value, trainable=False, dtype=dtype, shape=shape
    )

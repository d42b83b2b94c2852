"""The base class of compression specs: validated values with a cost, a contraction parameter and an exchange."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import AllReduce, Request, Rounds, Tensor, sent
from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import seeds, validation

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes

Message = tuple[type[Request], float]  # a collective and the bytes of one rank's payload
Memory = dict[str, Tensor]  # a spec's tensors for one layer, carried to the next step; see `memory_sharing`


def dtype_name(dtype: Any) -> str:
    """Returns the name of a floating-point dtype: "float32" for "float32", numpy.float32, torch.float32, tf.float32.

    Raises:
        ValueError: `dtype` is not one of ITEMSIZE.
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = name.rsplit(".", 1)[-1]
    if name not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    return name


@dataclass(frozen=True)
class Context:
    """Identifies an exchange: its layers, and the numbers from which seeds and slices are derived."""

    names: tuple[str, ...]
    dtype: str  # the framework's gradient dtype; the exchange itself works in fp32 or fp64
    step: Any  # an int, or an int64 scalar tensor inside a traced graph
    seed: int
    rank: int
    size: int

    def key(self, *parts: object) -> Any:
        """Returns the seed derived from `(seed, *parts, step)`."""
        return seeds.at(seeds.stable_hash(self.seed, *parts), self.step)


@dataclass(frozen=True)
class Decoded:
    """The result of an exchange's collectives, with one entry per layer in the order of the values.

    Attributes:
        finish: `finish(buffers, want_remainder)` returns the averaged gradients, equal on all ranks, and the remainder:
            the part of this rank's values that was not transmitted, or None unless wanted. The remainder may reuse the
            memory of the values. `buffers` is None, or a list with one buffer or None per layer. A buffer has the shape
            and dtype of its layer's value, and the average may be written into it.
        memory: `memory(is_finite)` returns what to keep for the next step. If `is_finite` is false, the old state is kept.
        is_finite: `is_finite()` returns a flag on the device: the received data holds no NaN or Inf. Equal on all ranks.
    """

    finish: Callable[[list[Tensor | None] | None, bool], tuple[list[Tensor], list[Tensor] | None]]
    memory: Callable[[Any], list[Memory]]
    is_finite: Callable[[], Tensor]


@dataclass(frozen=True)
class CompressionSpec(ABC):
    """Base class of all specs.

    Args:
        error_feedback: keep the part of the gradient that was not transmitted and add it to the next gradient
            (Karimireddy et al. 2019, arXiv 1901.09847).
    """

    _: KW_ONLY
    error_feedback: bool = True

    lossy: ClassVar[bool] = True
    # where layers travel in slices, an owner for each: whether each layer is cut by itself, or all of a group as one vector
    cuts_layers: ClassVar[bool] = False
    # the tensors in a layer's Memory by name, and whose each of them is
    memory_sharing: ClassVar[Mapping[str, Sharing]] = MappingProxyType({})

    def __post_init__(self) -> None:
        self._set_fields(error_feedback=validation.boolean("error_feedback", self.error_feedback))

    def _set_fields(self, **values: Any) -> None:
        """Stores validated arguments as plain Python types, so that equal specs have equal representations."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Returns a short form such as "PowerSGD(rank=4)": the first argument and all that differ from their defaults."""
        own = [f for f in fields(self) if f.name != "error_feedback"] + [
            f for f in fields(self) if f.name == "error_feedback"
        ]
        shown = [f for i, f in enumerate(own) if getattr(self, f.name) != f.default or (i == 0 and len(own) > 1)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def tag(self) -> str:
        """A short name, used in the names of collectives."""
        return type(self).__name__.lower()

    @abstractmethod
    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        """Returns the collectives that exchange a tensor of this shape and dtype among `world_size` ranks, in order.

        The layers of a group share each collective.
        """

    def bytes_per_step(self, shape: Sequence[int], dtype: Any, world_size: int) -> float:
        """Returns the bytes that one rank sends per step for a tensor of this shape and dtype, among `world_size` ranks."""
        return sum(sent(kind, nbytes, world_size) for kind, nbytes in self.messages(shape, dtype, world_size))

    @abstractmethod
    def delta(self, shape: Sequence[int]) -> float:
        """Returns the contraction parameter delta in (0, 1]: E||x - C(x)||^2 <= (1 - delta) ||x||^2."""

    def shrinks(self, shape: Sequence[int], dtype: Any, world_size: int) -> bool:
        """Returns whether compression sends fewer bytes than the dense tensor. A single rank is judged as two."""
        n = max(2, world_size)
        return self.bytes_per_step(shape, dtype, n) < dense_bytes(shape, dtype, n)

    def active(self, step: Any) -> Any:
        """Returns whether the spec compresses at this step; until then gradients are exchanged dense.

        Steps count from 0. `step` may be a scalar tensor of the framework.
        """
        del step
        return True

    def initial_memory(self, ops: Ops, value: Tensor, name: str, seed: int) -> Memory:
        """Returns the memory that an exchange assumes if a layer has none. Its shapes stay fixed from then on."""
        del ops, value, name, seed
        return {}

    @abstractmethod
    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        """Exchanges one group of layers: yields each collective, receives its result, returns the decoded gradients."""


def fused_mean(ops: Ops, tensors: list[Tensor]) -> Rounds[list[Tensor]]:
    """Averages the tensors over the ranks in one message, because Horovod negotiates each named tensor separately."""
    (mean,) = yield AllReduce([ops.flatten(tensors)])
    return ops.unflatten(mean, tensors)


def size(shape: Sequence[int]) -> int:
    """Returns the number of entries of a tensor of this shape."""
    return math.prod(shape)


def dense_bytes(shape: Sequence[int], dtype: Any, world_size: int) -> float:
    """Returns the bytes that one rank sends for the uncompressed tensor, in its own dtype."""
    return sent(AllReduce, size(shape) * ITEMSIZE[dtype_name(dtype)], world_size)

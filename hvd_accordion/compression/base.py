"""What every compression spec is: a frozen, validated value with a cost, a contraction parameter and an exchange."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import AllReduce, Request, Rounds, Tensor, sent
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import seeds, validation

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

Message = tuple[type[Request], float]  # a collective and the bytes of the payload that one rank hands to it
Memory = dict[str, Tensor]  # what a spec keeps of one layer from step to step, equal on all ranks


def dtype_name(dtype: Any) -> str:
    """ "float32" from "float32", numpy.float32, torch.float32, tf.float32. ValueError for anything else than a float."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = name.rsplit(".", 1)[-1]
    if name not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    return name


@dataclass(frozen=True)
class Context:
    """Where an exchange runs: the layers it is for and what seeds and slices depend on."""

    names: tuple[str, ...]
    dtype: str  # of the gradients as the framework gave them; values arrive in fp32 at least
    step: Any  # an int, or an int64 scalar where a traced graph counts
    seed: int
    rank: int
    size: int

    def key(self, *parts: object) -> Any:
        """A seed for this step from (seed, *parts, step)."""
        return seeds.at(seeds.stable_hash(self.seed, *parts), self.step)


@dataclass(frozen=True)
class Decoded:
    """What the rounds of an exchange came to: one entry a layer, in the order of the values it got.

    finish: gives the averaged gradients, as every rank holds them, and what this rank's values still hold unsent, which may
        take the values' memory. Its first argument, unless None, has memory of their shapes and dtypes for the averages,
        or None for some of them; the second says whether the remainder is wanted.
    memory: what to keep for the next step, given whether this one was sound.
    sound: a flag on the device: no NaN, no Inf in what came from the ranks; equal on all of them.
    """

    finish: Callable[[list[Tensor | None] | None, bool], tuple[list[Tensor], list[Tensor] | None]]
    memory: Callable[[Any], list[Memory]]
    is_finite: Callable[[], Tensor]


@dataclass(frozen=True)
class CompressionSpec(ABC):
    """Base of all specs.

    Args:
        error_feedback: keep what was not sent and add it to the next gradient (Karimireddy et al. 2019).
    """

    _: KW_ONLY
    error_feedback: bool = True

    lossy: ClassVar[bool] = True
    memory_keys: ClassVar[tuple[str, ...]] = ()  # of what an exchange may keep of a layer

    def __post_init__(self) -> None:
        self._checked(error_feedback=validation.boolean("error_feedback", self.error_feedback))

    def _checked(self, **values: Any) -> None:
        """Keeps arguments in the plain types that their checks return: equal specs have equal texts."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """PowerSGD(rank=4): the first argument, and whatever else differs from its default."""
        own = [f for f in fields(self) if f.name != "error_feedback"] + [
            f for f in fields(self) if f.name == "error_feedback"
        ]
        shown = [f for i, f in enumerate(own) if getattr(self, f.name) != f.default or (i == 0 and len(own) > 1)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def tag(self) -> str:
        """Short name, part of the names of collectives."""
        return type(self).__name__.lower()

    @abstractmethod
    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        """The collectives that a tensor of this shape and dtype takes among `world_size` ranks, in their order.

        A group's layers share each of them.
        """

    def bytes_per_step(self, shape: Sequence[int], dtype: Any, world_size: int) -> float:
        """Bytes that one rank sends a step for a tensor of this shape and dtype, among `world_size` ranks."""
        return sum(sent(kind, nbytes, world_size) for kind, nbytes in self.messages(shape, dtype, world_size))

    @abstractmethod
    def delta(self, shape: Sequence[int]) -> float:
        """The contraction parameter: E||x - C(x)||^2 <= (1 - delta) ||x||^2, 0 < delta <= 1."""

    def shrinks(self, shape: Sequence[int], dtype: Any, world_size: int) -> bool:
        """Whether a tensor of this shape gets smaller on the wire (of two ranks, where there is but one)."""
        n = max(2, world_size)
        return self.bytes_per_step(shape, dtype, n) < dense_bytes(shape, dtype, n)

    def active(self, step: Any) -> Any:
        """Whether the spec compresses at this step (counted from 0, also a framework's scalar); before, all goes dense."""
        del step
        return True

    def initial_memory(self, ops: Ops, value: Tensor, name: str, seed: int) -> Memory:
        """What the exchange of a layer takes for missing memory; shapes never change from then on."""
        del ops, value, name, seed
        return {}

    @abstractmethod
    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        """One round trip for a group of layers: yields the collectives it needs, returns what came of it."""


def joined_mean(ops: Ops, tensors: list[Tensor]) -> Rounds[list[Tensor]]:
    """Their means over the ranks, by one message: Horovod negotiates each tensor by its name."""
    (mean,) = yield AllReduce([ops.flatten(tensors)])
    return ops.unflatten(mean, tensors)


def size(shape: Sequence[int]) -> int:
    return math.prod(shape)


def dense_bytes(shape: Sequence[int], dtype: Any, world_size: int) -> float:
    """Bytes that one rank sends for the uncompressed tensor, in its own dtype."""
    return sent(AllReduce, size(shape) * ITEMSIZE[dtype_name(dtype)], world_size)

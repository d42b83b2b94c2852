"""16-bit floats on the wire, summed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression.base import CompressionSpec, Context, Decoded, Memory, Message, size
from hvd_accordion.compression.two_hop import two_hop, two_hop_messages
from hvd_accordion.ops.protocol import Ops


@dataclass(frozen=True)
class HalfCode:
    """Rounds each value to a 16-bit float and sends its two bytes."""

    dtype: str
    block: ClassVar[int] = 1

    def nbytes(self, count: int) -> int:
        return 2 * count

    def encode(self, ops: Ops, x: Tensor, seed: int) -> Tensor:
        del seed
        return ops.to_bytes(ops.cast(x, self.dtype))

    def decode(self, ops: Ops, code: Tensor, like: Tensor) -> Tensor:
        return ops.cast_like(ops.from_bytes(code, self.dtype), like)


@dataclass(frozen=True)
class _Half(CompressionSpec):
    """A two-hop allreduce of values rounded to `dtype`."""

    dtype: ClassVar[str]

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        return two_hop_messages(HalfCode(self.dtype), size(shape), world_size)

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        return (yield from two_hop(ops, values, memory, HalfCode(self.dtype), ctx))


@dataclass(frozen=True)
class FP16(_Half):
    """IEEE half precision (11 bits of mantissa, `|x| <= 65504`). The ranks' values are summed in fp32, not in fp16."""

    dtype: ClassVar[str] = "float16"

    def delta(self, shape: Sequence[int]) -> float:
        """Returns 1 - 2^-22: rounding a normal number to nearest has a relative error of at most 2^-11."""
        return 1.0 - 2.0**-22


@dataclass(frozen=True)
class BF16(_Half):
    """bfloat16: 8 bits of mantissa and the range of fp32. Horovod itself cannot sum bfloat16."""

    dtype: ClassVar[str] = "bfloat16"

    def delta(self, shape: Sequence[int]) -> float:
        """Returns 1 - 2^-16: rounding to nearest has a relative error of at most 2^-8."""
        return 1.0 - 2.0**-16

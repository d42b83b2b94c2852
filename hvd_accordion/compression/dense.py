"""Dense exchange: one allreduce without compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import AllReduce, Rounds, Tensor
from hvd_accordion.compression.base import (
    ITEMSIZE,
    CompressionSpec,
    Context,
    Decoded,
    Memory,
    Message,
    dtype_name,
    fused_mean,
    size,
)
from hvd_accordion.compression.half import HalfCode
from hvd_accordion.compression.two_hop import two_hop, two_hop_messages
from hvd_accordion.ops.protocol import Ops

FUSE_LIMIT = 2**18  # up to this many values, copying into one tensor is faster than negotiating each tensor


@dataclass(frozen=True)
class Dense(CompressionSpec):
    """Sends the whole gradient in its own dtype. 16-bit gradients use a two-hop allreduce that sums in fp32."""

    lossy: ClassVar[bool] = False

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        dtype = dtype_name(dtype)
        if ITEMSIZE[dtype] == 2:
            return two_hop_messages(HalfCode(dtype), size(shape), world_size)
        return [(AllReduce, size(shape) * ITEMSIZE[dtype])]

    def delta(self, shape: Sequence[int]) -> float:
        return 1.0

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        if ITEMSIZE[ctx.dtype] == 2:
            return (yield from two_hop(ops, values, memory, HalfCode(ctx.dtype), ctx))
        if sum(size(v.shape) for v in values) <= FUSE_LIMIT:
            mean = yield from fused_mean(ops, values)
        else:
            mean = yield AllReduce(values)

        def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            return mean, ops.zeros_like(mean) if want_remainder else None

        return Decoded(finish, lambda _: memory, lambda: ops.all_finite(mean))

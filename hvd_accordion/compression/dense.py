"""No compression: one allreduce."""

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
    joined_mean,
    size,
)
from hvd_accordion.compression.half import HalfCode
from hvd_accordion.compression.two_hop import two_hop, two_hop_messages
from hvd_accordion.ops.protocol import Ops

FEW = 2**18  # values that are sooner copied than negotiated one by one


@dataclass(frozen=True)
class Dense(CompressionSpec):
    """The whole gradient in its own dtype. 16-bit gradients are summed in fp32 on the way (a two-hop allreduce)."""

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
        if sum(size(v.shape) for v in values) <= FEW:
            mean = yield from joined_mean(ops, values)
        else:
            mean = yield AllReduce(values)

        def split(_: Any, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            return mean, ops.zeros_like(mean) if remainder else None

        return Decoded(split, lambda _: memory, lambda: ops.all_finite(mean))

"""No compression: one allreduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_accordion.collectives import Agree, AllReduce, Rounds, Tensor
from hvd_accordion.compression.base import (
    ITEMSIZE,
    CompressionSpec,
    Context,
    Exchanged,
    Memory,
    dense_bytes,
    dtype_name,
    size,
)
from hvd_accordion.compression.half import HalfCode
from hvd_accordion.compression.two_hop import two_hop, two_hop_bytes
from hvd_accordion.ops.protocol import Ops


@dataclass(frozen=True)
class Dense(CompressionSpec):
    """The whole gradient in its own dtype. 16-bit gradients are summed in fp32 on the way (a two-hop allreduce)."""

    lossy: ClassVar[bool] = False

    def bytes_per_step(self, shape: Sequence[int], dtype: Any, world_size: int) -> float:
        if ITEMSIZE[dtype_name(dtype)] == 2:
            return two_hop_bytes(HalfCode(dtype_name(dtype)), size(shape), world_size)
        return dense_bytes(shape, dtype, world_size)

    def delta(self, shape: Sequence[int]) -> float:
        return 1.0

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Exchanged]:
        if ITEMSIZE[ctx.dtype] == 2:
            return (yield from two_hop(ops, values, memory, HalfCode(ctx.dtype), ctx))
        mean = yield AllReduce(values)
        ok = yield Agree(ops.all_finite(mean))
        return Exchanged(mean, lambda: ops.zeros_like(mean), memory, ok)

"""A compressor as a user writes one: nothing in the package knows of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_accordion import CompressionSpec
from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.compression import Decoded
from hvd_accordion.compression.base import fused_mean, size
from hvd_accordion.compression.sparse import value_bytes


@dataclass(frozen=True)
class RandomPart(CompressionSpec):
    """Sends one of `parts` equal stretches of each layer, drawn anew each step and the same on all ranks."""

    parts: int = 4

    def messages(self, shape, dtype, world_size):
        return [(AllReduce, -(-size(shape) // self.parts) * value_bytes(dtype))]

    def delta(self, shape):
        return 1 / self.parts

    def exchange(self, ops, values, memory, ctx):
        lengths = [-(-size(v.shape) // self.parts) for v in values]
        flats = [ops.reshape(v, (-1,)) for v in values]
        rows = [ops.pad(x, self.parts * n, (self.parts, n)) for x, n in zip(flats, lengths, strict=True)]
        drawn = [ctx.key(name) % self.parts for name in ctx.names]
        # NaN and Inf must reach the other ranks from the other parts too
        taken = [ops.where(ops.all_finite([x]), x[i], math.nan) for x, i in zip(rows, drawn, strict=True)]
        means = yield from fused_mean(ops, taken)

        def layers(rows):
            return [ops.unflatten(ops.reshape(x, (-1,)), [v])[0] for x, v in zip(rows, values, strict=True)]

        def finish(buffers, want_remainder):
            zeros = ops.zeros_like(rows)
            rest = [ops.add_row(x, i, -x[i]) for x, i in zip(rows, drawn, strict=True)] if want_remainder else None
            applied = [ops.add_row(x, i, mean) for x, i, mean in zip(zeros, drawn, means, strict=True)]
            return layers(applied), layers(rest) if want_remainder else None

        return Decoded(finish, lambda is_finite: memory, lambda: ops.all_finite(means))

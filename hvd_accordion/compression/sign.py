"""Signs: one bit a value and one scale a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import AllGather, Rounds, Tensor
from hvd_accordion.compression.base import CompressionSpec, Context, Decoded, Memory, Message, size
from hvd_accordion.compression.two_hop import average_rows, slice_size, two_hop_messages
from hvd_accordion.ops.protocol import Ops

GATHERED = 2  # up to this many ranks a gathered code takes no more bytes than two hops, and is encoded once


@dataclass(frozen=True)
class SignCode:
    """Encodes rows of several layers: an fp32 scale for each layer, mean |x|, then a bit for each value, 1 for x >= 0.

    Args:
        widths: values of each layer in a row, padded to multiples of `block`.
        counts: for each row, how many values of each layer are real. Of several rows, the others are 0.
    """

    widths: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    block: ClassVar[int] = 8

    def nbytes(self, count: int) -> int:
        return 4 * len(self.widths) + count // 8

    def encode(self, ops: Ops, x: Tensor, seed: int) -> Tensor:
        del seed
        return self.encode_layers(ops, self.layers(x))

    def encode_layers(self, ops: Ops, layers: list[Tensor]) -> Tensor:
        """Encodes the rows of each layer, matrices of one width each."""
        most = [max(row) for row in zip(*self.counts, strict=True)]
        sums = [ops.sum(abs(x[:, :count]), -1, keepdims=True) for x, count in zip(layers, most, strict=True)]
        counts = ops.constant([max(1, count) for row in self.counts for count in row], layers[0])
        counts = ops.reshape(ops.cast_like(counts, layers[0]), (len(self.counts), len(self.widths)))
        scales = ops.cast(ops.concat(sums, -1) / counts, "float32")
        positive = ops.concat([ops.cast(x >= 0, "uint8") for x in layers], -1)
        return ops.concat([ops.to_bytes(scales), ops.pack_bits(positive, 1)], -1)

    def decode(self, ops: Ops, code: Tensor, like: Tensor) -> Tensor:
        scales, octets = self.parts(ops, code)
        rows, n = octets.shape
        signs = ops.reshape(ops.take(signs_of_octets(ops, like), ops.reshape(octets, (-1,))), (rows, 8 * n))
        scales = ops.cast_like(scales, like)
        return ops.concat([x * scales[:, i : i + 1] for i, x in enumerate(self.layers(signs))], -1)

    def parts(self, ops: Ops, code: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scales of encoded rows, a column for each layer, and 8 signs each as a number (int32)."""
        end = 4 * len(self.widths)
        return ops.from_bytes(code[:, :end], "float32"), ops.cast(code[:, end:], "int32")

    def layers(self, x: Tensor) -> list[Tensor]:
        """Returns the columns of each layer."""
        ends = itertools.accumulate(self.widths)
        return [x[:, end - width : end] for end, width in zip(ends, self.widths, strict=True)]


def sign_code(sizes: Sequence[int], slices: int, own: int | None = None) -> SignCode:
    """Returns the code of layers of these sizes, each cut into slices, a row for each; with `own`, of that slice alone."""
    widths = tuple(slice_size(count, slices, SignCode.block) for count in sizes)
    rows = range(slices) if own is None else (own,)
    counts = tuple(tuple(max(0, min(w, d - r * w)) for d, w in zip(sizes, widths, strict=True)) for r in rows)
    return SignCode(widths, counts)


def signs_of_octets(ops: Ops, like: Tensor) -> Tensor:
    """Returns a matrix (256, 8): the signs, 1 or -1, that each number of 8 bits stands for."""
    octets = ops.reshape(ops.cast(ops.arange(256, like), "uint8"), (256, 1))
    return ops.cast_like(ops.unpack_bits(octets, 1), like) * 2 - 1


@dataclass(frozen=True)
class EFSignSGD(CompressionSpec):
    """Packed signs and one scale a tensor (Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 1).

    For a tensor of d values C(x) = ||x||_1 / d sign(x), with sign(0) = 1: one bit a value and 4 bytes a tensor.

    2 ranks gather the codes and average them. From 3 ranks on the codes travel in two hops, as in 1-bit Adam (Tang et al.
    2021, arXiv 2102.02888): a tensor is cut into a slice for each rank, which has a scale of its own.
    """

    cuts_layers: ClassVar[bool] = True

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        if world_size <= GATHERED:
            code = sign_code([size(shape)], 1)
            return [(AllGather, code.nbytes(sum(code.widths)))]
        return two_hop_messages(sign_code([size(shape)], world_size), size(shape), world_size)

    def delta(self, shape: Sequence[int]) -> float:
        """Returns 1/d, which bounds ||x||_1^2 / (d ||x||_2^2) from below: it is 1/d for one value among zeros.

        For values of one magnitude delta is 1, for Gaussian values 2/pi.
        """
        return 1 / max(1, size(shape))

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        send = _gather if ctx.size <= GATHERED else _two_hops
        return (yield from send(ops, values, memory, ctx))


def _gather(ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
    """Every rank receives the codes of all, and averages what they decode to."""
    code = sign_code([size(v.shape) for v in values], 1)
    received = yield AllGather(ops.reshape(code.encode_layers(ops, _rows(ops, values, code)), (-1,)))
    scales, octets = code.parts(ops, received)

    def share(rank: int) -> list[Tensor]:
        """What the mean has from a rank."""
        signs = signs_of_octets(ops, values[0])
        weights = ops.cast_like(scales[rank], signs) / ctx.size
        ends = itertools.accumulate(w // 8 for w in code.widths)
        found = [
            ops.take(signs * weights[i], octets[rank, end - w // 8 : end])
            for i, (w, end) in enumerate(zip(code.widths, ends, strict=True))
        ]
        return _values(ops, found, values)

    def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        shares = [share(rank) for rank in range(ctx.size)]
        remainder = ops.accumulate(values, shares[ctx.rank], -ctx.size, None) if want_remainder else None
        mean, *others = shares
        for other in others:
            mean = ops.accumulate(mean, other, 1.0, None)
        return mean, remainder

    return Decoded(finish, lambda _: memory, lambda: ops.all_finite([scales]))


def _two_hops(ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
    """Each rank averages its slice of each layer, and encodes the mean."""
    sizes = [size(v.shape) for v in values]
    code, owners_code = sign_code(sizes, ctx.size), sign_code(sizes, ctx.size, ctx.rank)
    first = code.encode_layers(ops, _rows(ops, values, code))
    mean, lost = yield from average_rows(ops, first, values[0], code, owners_code, ctx)

    def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        means = _values(ops, code.layers(mean), values)
        if not want_remainder:
            return means, None
        applied = ops.add_row(code.decode(ops, first, values[0]), ctx.rank, -lost())
        return means, ops.accumulate(values, _values(ops, code.layers(applied), values), -1.0, None)

    return Decoded(finish, lambda _: memory, lambda: ops.all_finite([mean]))


def _rows(ops: Ops, values: list[Tensor], code: SignCode) -> list[Tensor]:
    """Cuts each layer into the code's rows."""
    n = len(code.counts)
    flats = [ops.reshape(v, (-1,)) for v in values]
    return [ops.pad(x, n * width, (n, width)) for x, width in zip(flats, code.widths, strict=True)]


def _values(ops: Ops, rows: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Returns layers from rows that end with padding."""
    flats = [ops.reshape(x, (-1,)) for x in rows]
    return [ops.reshape(x[: size(v.shape)], v.shape) for x, v in zip(flats, like, strict=True)]

"""The primitives in torch, on any device, without a wait for it. See protocol.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, floor, reshape, stack, where

__all__ = ["floor", "reshape", "stack", "where"]


def widen(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous() for x in xs]


def add(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    torch._foreach_add_(list(xs), list(ys))
    return list(xs)


def subtract(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    torch._foreach_sub_(list(xs), list(ys))
    return list(xs)


def zeros_like(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) for x in xs]


def commit(ok: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(ok, n, o, out=o) for n, o in zip(new, old, strict=True)]


def all_finite(xs: Sequence[Tensor]) -> Tensor:
    filled = [x for x in xs if x.numel()]  # an empty tensor has no largest entry
    if not filled:
        return torch.ones((), dtype=torch.bool, device=xs[0].device)
    return torch.isfinite(torch.stack(torch._foreach_norm(filled, float("inf")))).all()


def flatten(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in xs])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [x.numel() for x in like]
    ends = list(itertools.accumulate(sizes))
    return [flat[end - n : end].view(x.shape) for x, n, end in zip(like, sizes, ends, strict=True)]


def transpose(x: Tensor) -> Tensor:
    return x.mT


def concat(xs: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(list(xs), dim=axis)


def pad(flat: Tensor, size: int, shape: Sequence[int]) -> Tensor:
    return torch.nn.functional.pad(flat, (0, size - flat.numel())).view(*shape)


def zeros(size: int, like: Tensor) -> Tensor:
    return torch.zeros(size, dtype=like.dtype, device=like.device)


def dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(getattr(torch, dtype))


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def to_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def from_bytes(x: Tensor, dtype: str) -> Tensor:
    to = getattr(torch, dtype)
    x = x.contiguous()
    # a view at another item size wants every row to start at a whole item
    if x.storage_offset() % to.itemsize or any(s % to.itemsize for s in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(to)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def max(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return x.amax(dim=axis, keepdim=keepdims)


def sum(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return x.sum(dim=axis, keepdim=keepdims)


def top_k(x: Tensor, k: int) -> Tensor:
    return x.abs().topk(k, sorted=False).indices.to(torch.int32)


def affine(factors: Sequence[int], pick: int, shift: int, k: int, count: int, like: Tensor) -> Tensor:
    a = factors[pick % len(factors)]
    return ((torch.arange(k, dtype=torch.int64, device=like.device) * a + shift) % count).to(torch.int32)


def take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def put(x: Tensor, index: Tensor, value: float) -> Tensor:
    return x.index_fill_(0, index.long(), value)


def scatter_add(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return x.index_add_(0, index, values)


def add_row(x: Tensor, row: int, values: Tensor) -> Tensor:
    x[row].add_(values)
    return x


def uniform(seed: int, count: int, like: Tensor) -> Tensor:
    # in int32, which wraps as uint32 does; shifts are arithmetic there, so the sign's copies are masked off
    x = torch.arange(count, dtype=torch.int32, device=like.device)
    x.mul_(_signed(0x9E3779B1)).add_(_signed(seed))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return (x >> 8).bitwise_and_(0xFFFFFF).to(like.dtype).mul_(2.0**-24)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def wave(frequency: int, like: Tensor) -> Tensor:
    rows = torch.arange(1, like.shape[-2] + 1, dtype=torch.float64, device=like.device)
    return rows.mul_(frequency).sin_().to(like.dtype).unsqueeze(1)


def pack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    words = x.view(*x.shape[:-1], -1, 8).long()
    word = words[..., 0]
    for i in range(1, 8):
        word = word | (words[..., i] << (bits * i))
    return torch.stack([(word >> (8 * i)).to(torch.uint8) for i in range(bits)], dim=-1).flatten(-2)


def unpack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    words = x.reshape(*x.shape[:-1], -1, bits).long()
    word = words[..., 0]
    for i in range(1, bits):
        word = word | (words[..., i] << (8 * i))
    mask = (1 << bits) - 1
    return torch.stack([((word >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=-1).flatten(-2)


def project(matrices: Sequence[Tensor], q: Tensor) -> Tensor:
    if q.device.type != "cpu":  # many small products cost launches there
        return torch.bmm(torch.stack(list(matrices)), q)
    out = q.new_empty(q.shape[0], matrices[0].shape[0], q.shape[2])
    for i, matrix in enumerate(matrices):
        torch.mm(matrix, q[i], out=out[i])
    return out


def project_t(matrices: Sequence[Tensor], p: Tensor) -> Tensor:
    if p.device.type != "cpu":
        return torch.bmm(torch.stack(list(matrices)).mT, p).contiguous()
    out = p.new_empty(p.shape[0], matrices[0].shape[1], p.shape[2])
    for i, matrix in enumerate(matrices):
        torch.mm(matrix.t(), p[i], out=out[i])
    return out


def outer(p: Tensor, q: Tensor) -> Tensor:
    return torch.mm(p, q.t())

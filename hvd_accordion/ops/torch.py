"""The primitives in torch, for any device, without synchronising with it. See protocol.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch import floor as floor
from torch import reshape as reshape
from torch import where as where

from hvd_accordion.ops import selection
from hvd_accordion.ops.protocol import Finish

CACHED = 2**16  # entries that stay in a core's cache between two passes
SHORT = 1536  # up to this row length, M Q is up to 1.5 times as fast as (Q^T M^T)^T


def upcast(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous() for x in xs]


def add(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    if not is_on_cpu(ys[0]):
        return list(torch._foreach_add(list(xs), list(ys)))
    return [_add_in_place(x, y) for x, y in zip(xs, ys, strict=True)]


def _add_in_place(x: Tensor, y: Tensor) -> Tensor:
    """Returns x + y in the memory of y. If x holds NaN or Inf, y is restored up to rounding, and the sum is a new tensor.

    Works in parts that fit the cache, so that the check and the sum read memory once.
    """
    added, flat_x, flat_y = 0, x.view(-1), y.view(-1)
    for part, target in zip(torch.split(flat_x, CACHED), torch.split(flat_y, CACHED), strict=True):
        if not _has_finite_sum(part):
            flat_y[:added].sub_(flat_x[:added])
            return x + y
        target.add_(part)
        added += part.numel()
    return y


def _has_finite_sum(x: Tensor) -> bool:
    """Returns False if x holds NaN or Inf, or if its sum overflows."""
    return math.isfinite(x.sum().item())


def undo_add(y: Tensor, x: Tensor) -> Tensor:
    """Returns y as it was before `add([x], [y])`, up to rounding."""
    (x,) = upcast([x])
    return y - x if is_on_cpu(y) and _has_finite_sum(x) else y


def accumulate(sums: Sequence[Tensor], xs: Sequence[Tensor], weight: float, is_finite: Tensor | None) -> list[Tensor]:
    if is_finite is not None and not is_on_cpu(is_finite):
        xs = unflatten(torch.where(is_finite, flatten(xs), 0.0), xs)
    if is_finite is None or not is_on_cpu(is_finite) or is_finite:
        torch._foreach_add_(list(sums), list(xs), alpha=weight)
    return list(sums)


def zeros_like(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) for x in xs]


def is_on_cpu(x: Tensor) -> bool:
    """Returns whether the tensor is on the CPU, where reading a value costs no synchronisation."""
    return x.device.type == "cpu"


def commit_residual(
    is_finite: Tensor, finish: Finish, values: Sequence[Tensor], residual: Sequence[Tensor], xs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    if is_on_cpu(residual[0]):  # no copy: values and remainder share the residual's memory
        if is_finite:
            return finish(True)
        mean, _ = finish(False)
        return mean, [e.sub_(x) if v is e else e for v, e, x in zip(values, residual, xs, strict=True)]
    mean, remainder = finish(True)
    return mean, [torch.where(is_finite, new, old, out=old) for new, old in zip(remainder, residual, strict=True)]


def all_finite(xs: Sequence[Tensor]) -> Tensor:
    nonempty = [x for x in xs if x.numel()]  # an empty tensor has no maximum
    if not nonempty:
        return torch.ones((), dtype=torch.bool, device=xs[0].device)
    if is_on_cpu(xs[0]):  # where the infinity norm takes twenty times as long as aminmax
        return torch.isfinite(torch.stack([end for x in nonempty for end in torch.aminmax(x)])).all()
    return torch.isfinite(torch.stack(torch._foreach_norm(nonempty, float("inf")))).all()


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


def stack(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs))


def pad(flat: Tensor, size: int, shape: Sequence[int]) -> Tensor:
    more = size - flat.numel()
    return (torch.nn.functional.pad(flat, (0, more)) if more else flat).view(*shape)


def pad_rows(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[2]))


def zeros(size: int, like: Tensor) -> Tensor:
    return torch.zeros(size, dtype=like.dtype, device=like.device)


def cleared(x: Tensor) -> Tensor:
    return x.view(-1).zero_()


def full(size: int, value: Tensor) -> Tensor:
    return value.expand(size).clone()  # torch.full would synchronise to read the value


def constant(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(like.device, non_blocking=True)


def arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


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
    # a view with a larger item size requires every row to start at a multiple of it
    if x.storage_offset() % to.itemsize or any(s % to.itemsize for s in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(to)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def max(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return x.amax(dim=axis, keepdim=keepdims)


def sum(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return x.sum(dim=axis, keepdim=keepdims)


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x)


def top_k(x: Tensor, k: int) -> Tensor:
    if is_on_cpu(x):
        return torch.from_numpy(selection.fast(x.detach().numpy(), k))
    return x.abs().topk(k, sorted=False).indices.to(torch.int32).sort().values


def argsort(x: Tensor) -> Tensor:
    return torch.argsort(x).to(torch.int32)


def searchsorted(ascending: Tensor, values: Tensor) -> Tensor:
    return torch.searchsorted(ascending, values, right=True, out_int32=True)


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
    # int32 arithmetic wraps like uint32; its right shift copies the sign bit, which is masked off
    x = torch.arange(count, dtype=torch.int32, device=like.device)
    x.mul_(_to_int32(0x9E3779B1)).add_(_to_int32(seed))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_to_int32(0x846CA68B))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return (x >> 8).bitwise_and_(0xFFFFFF).to(like.dtype).mul_(2.0**-24)


def _to_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def filler_basis(like: Tensor) -> Tensor:
    _, r, n = like.shape
    row = torch.arange(1, n + 1, dtype=torch.float64, device=like.device)
    times = torch.arange(1, r + 1, dtype=torch.float64, device=like.device)
    return torch.outer(times, row).sin_().to(like.dtype).expand(like.shape)


def pack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    if bits == 1 and is_on_cpu(x):
        return torch.from_numpy(np.packbits(x.numpy(), axis=-1, bitorder="little"))
    words = x.view(*x.shape[:-1], -1, 8)
    words = words if bits == 1 else words.long()
    word = words[..., 0]
    for i in range(1, 8):
        word = word | (words[..., i] << (bits * i))
    return torch.stack([(word >> (8 * i)).to(torch.uint8) for i in range(bits)], dim=-1).flatten(-2)


def unpack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    if bits == 1 and is_on_cpu(x):
        return torch.from_numpy(np.unpackbits(x.numpy(), axis=-1, bitorder="little"))
    words = x.reshape(*x.shape[:-1], -1, bits)
    words = words if bits == 1 else words.long()
    word = words[..., 0]
    for i in range(1, bits):
        word = word | (words[..., i] << (8 * i))
    mask = (1 << bits) - 1
    return torch.stack([((word >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=-1).flatten(-2)


def project(matrices: Sequence[Tensor], q: Tensor) -> Tensor:
    if not is_on_cpu(q):  # one batched product, because each launch of a kernel costs time
        return torch.bmm(q, torch.stack(list(matrices)).mT)
    out = q.new_empty(q.shape[0], q.shape[1], matrices[0].shape[0])
    for i, matrix in enumerate(matrices):
        if matrix.shape[1] <= SHORT:
            out[i].copy_(torch.mm(matrix, q[i].t()).t())
        else:
            torch.mm(q[i], matrix.t(), out=out[i])
    return out


def project_t(matrices: Sequence[Tensor], p: Tensor) -> Tensor:
    if not is_on_cpu(p):
        return torch.bmm(p, torch.stack(list(matrices)))
    out = p.new_empty(p.shape[0], p.shape[1], matrices[0].shape[1])
    for i, matrix in enumerate(matrices):
        torch.mm(p[i], matrix, out=out[i])
    return out


def low_rank(
    matrix: Tensor, p: Tensor, q: Tensor, buffer: Tensor | None, want_remainder: bool
) -> tuple[Tensor, Tensor | None]:
    product = torch.empty_like(matrix) if buffer is None else buffer
    n, m = matrix.shape
    rows = CACHED // m + 1 if is_on_cpu(matrix) else n
    p = p.t().contiguous()
    for i in range(0, n, rows):
        torch.mm(p[i : i + rows], q, out=product[i : i + rows])
        if want_remainder:
            matrix[i : i + rows].sub_(product[i : i + rows])
    return product, matrix if want_remainder else None

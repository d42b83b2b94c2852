"""Which entries of a layer stand for all of it where its gradient's norm is estimated: a formula, nothing is drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from hvd_accordion.ops.protocol import Ops, Tensor
from hvd_accordion.utils import seeds

GOLDEN = (math.sqrt(5) - 1) / 2


def entries(ops: Ops, name: str, count: int, size: int, seed: int, like: Any) -> Tensor:
    """int32 positions of `size` entries among the `count` of a layer: a j + b mod count for j < size.

    Distinct and spread evenly by the choice of a; each entry is as likely as any other, for b comes from (seed, name).
    The same on every rank and in every framework, in the same order.
    """
    shift = seeds.stable_hash(seed, name, "watched") % max(1, count)
    return ops.affine((multiplier(count),), 0, shift, size, max(1, count), like)


@functools.lru_cache(maxsize=4096)
def multiplier(count: int) -> int:
    """Of the 256 numbers from count / 1.618 on the one whose multiples are most evenly spread modulo `count`.

    That is the one, coprime to `count`, whose ratio to it has the smallest terms as a continued fraction: the gaps that any
    number of multiples leave differ by a factor of no more than the largest term and two.
    """
    first = round(GOLDEN * count)
    return min((a for a in range(first, first + 256) if math.gcd(a, count) == 1), key=lambda a: max(terms(a, count)))


def terms(a: int, b: int) -> Iterator[int]:
    """Of a / b as a continued fraction, from the second on."""
    while a:
        yield b // a
        a, b = b % a, a


def scale(count: int, size: int) -> float:
    """What the norm of `size` entries is multiplied with to estimate that of all `count`: sqrt(count / size)."""
    return math.sqrt(count / size) if size else 1.0

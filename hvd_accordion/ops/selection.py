"""Selection of the k entries of a vector with the largest magnitude, on the CPU.

The bits of a float without its sign are ordered like its magnitude, with NaN above Inf. So integers are compared. Of equal
entries the first are selected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

SMALL = 2**17  # up to this many entries, a partition of all is as fast as the sampled threshold
CHUNK = 2**16  # entries that stay in a core's cache between two passes
SAMPLE = 2**14  # entries in the sample


def exact(x: Array, k: int) -> Array:
    """Returns the int32 indices in ascending order, by a partition of all magnitudes."""
    bits = magnitudes(x)
    limit = np.partition(bits, bits.size - k)[bits.size - k]
    return with_first_ties(np.flatnonzero(bits > limit), np.flatnonzero(bits == limit), k)


def fast(x: Array, k: int) -> Array:
    """Returns the same indices as `exact`, but compares most entries only with a threshold estimated from a sample.

    The estimate is slightly low: with s the expected number of sampled entries above the exact threshold, it lies 4 sqrt(s)
    entries lower. If it is too high all the same, ties may complete the k entries. Otherwise a lower one is tried.
    """
    if x.size <= SMALL or 4 * k > x.size:
        return exact(x, k)
    sample = np.sort(magnitudes(x[:: x.size // SAMPLE | 1]))  # an odd stride does not sample a single column
    expected = sample.size * k / x.size
    for deviations in (4, 16):
        rank = sample.size - 1 - int(expected + deviations * (expected**0.5 + 1))
        if rank < 0:
            break
        above = indices_where(np.greater, x, sample[rank])
        if above.size >= k:
            return above[exact(x[above], k)].astype(np.int32)
        equal = indices_where(np.equal, x, sample[rank], k - above.size)
        if above.size + equal.size >= k:
            return with_first_ties(above, equal, k)
    return exact(x, k)


def magnitudes(x: Array) -> Array:
    """Returns the bits of x without the sign, as integers."""
    integer = np.int64 if x.dtype == np.float64 else np.int32
    return np.bitwise_and(x.view(integer), np.iinfo(integer).max)


def with_first_ties(above: Array, equal: Array, k: int) -> Array:
    """Returns k ascending indices: all of `above`, completed by the first of `equal`."""
    return np.sort(np.concatenate([above, equal[: k - above.size]])).astype(np.int32)


def indices_where(compare: Callable[..., Array], x: Array, limit: Array, enough: int | None = None) -> Array:
    """Returns the ascending indices where `compare(magnitude, limit)` holds. Stops once `enough` are found."""
    bits, sign_mask = x.view(limit.dtype), np.iinfo(limit.dtype).max
    magnitude, matches = np.empty(CHUNK, limit.dtype), np.empty(CHUNK, bool)
    found, count = [], 0
    for start in range(0, x.size, CHUNK):
        size = min(CHUNK, x.size - start)
        np.bitwise_and(bits[start : start + size], sign_mask, out=magnitude[:size])
        compare(magnitude[:size], limit, out=matches[:size])
        found.append(np.flatnonzero(matches[:size]) + start)
        count += found[-1].size
        if enough is not None and count >= enough:
            break
    return np.concatenate(found)

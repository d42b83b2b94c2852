"""The k entries of a vector that are largest in magnitude, on the CPU.

Of floats without their sign the bits are in the order of the values, NaN behind Inf, so integers are compared. Of equal
entries the first are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

SMALL = 2**17  # entries up to which a partition of the whole takes no longer than what saves it
CHUNK = 2**16  # entries that stay in a core's cache between two passes over them
SAMPLE = 2**14


def exact(x: Array, k: int) -> Array:
    """int32 indices in ascending order, by a partition of all magnitudes."""
    bits = magnitudes(x)
    limit = np.partition(bits, bits.size - k)[bits.size - k]
    return filled(np.flatnonzero(bits > limit), np.flatnonzero(bits == limit), k)


def fast(x: Array, k: int) -> Array:
    """The same: nearly all entries are only compared with a limit, guessed from a sample to be a little too low.

    The sample's place of the limit has a standard deviation of sqrt(share) of its entries, as for a random one. A guess
    that proves too high is no harm: where ties with it fill up the k, it was the limit; else the next is lower.
    """
    if x.size <= SMALL or 4 * k > x.size:
        return exact(x, k)
    sample = np.sort(magnitudes(x[:: x.size // SAMPLE | 1]))  # an odd stride: no column of a matrix alone
    share = sample.size * k / x.size
    for deviations in (4, 16):
        place = sample.size - 1 - int(share + deviations * (share**0.5 + 1))
        if place < 0:
            break
        above = matching(np.greater, x, sample[place])
        if above.size >= k:
            return above[exact(x[above], k)].astype(np.int32)
        equal = matching(np.equal, x, sample[place], k - above.size)
        if above.size + equal.size >= k:
            return filled(above, equal, k)
    return exact(x, k)


def magnitudes(x: Array) -> Array:
    """Bits without the sign."""
    whole = np.int64 if x.dtype == np.float64 else np.int32
    return np.bitwise_and(x.view(whole), np.iinfo(whole).max)


def filled(above: Array, equal: Array, k: int) -> Array:
    """All of `above`, and so many of the first of `equal` that they are k, in ascending order."""
    return np.sort(np.concatenate([above, equal[: k - above.size]])).astype(np.int32)


def matching(compare: Callable[..., Array], x: Array, limit: Array, enough: int | None = None) -> Array:
    """Indices, ascending, of the entries whose magnitude is `compare` to the limit; no more where there are enough."""
    bits, most = x.view(limit.dtype), np.iinfo(limit.dtype).max
    magnitude, matches = np.empty(CHUNK, limit.dtype), np.empty(CHUNK, bool)
    found, count = [], 0
    for start in range(0, x.size, CHUNK):
        size = min(CHUNK, x.size - start)
        np.bitwise_and(bits[start : start + size], most, out=magnitude[:size])
        compare(magnitude[:size], limit, out=matches[:size])
        found.append(np.flatnonzero(matches[:size]) + start)
        count += found[-1].size
        if enough is not None and count >= enough:
            break
    return np.concatenate(found)

"""Seeds that are the same on every rank, in every framework and in every process: hashes, no generator state."""

from __future__ import annotations

import hashlib
from typing import Any

PRIME = 2**31 - 1


def stable_hash(*parts: object) -> int:
    """A 31-bit hash of the parts' text, equal in every process (Python's own `hash` is salted)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1


def at(key: int, step: Any) -> Any:
    """The seed of a step, (key + c step)^5 mod 2^31 - 1: for one key all steps below 2^31 - 1 have seeds of their own.

    `step` may be a framework's int64: every product is below 2^62.
    """
    x = (key + step * 48271) % PRIME
    square = x * x % PRIME
    return square * square % PRIME * x % PRIME

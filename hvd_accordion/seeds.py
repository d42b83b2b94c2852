"""Seeds that are the same on every rank, in every framework and in every process: stable hashes, no generator state."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: object) -> int:
    """A 31-bit hash of the parts' text, equal in every process (Python's own `hash` is salted)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1

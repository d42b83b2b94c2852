"""A text file as numbers of characters: one part for training, in random windows, and its end for validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

VALIDATION = 0.1  # of the text


class Text(NamedTuple):
    """Numbers of characters, and how many different ones there are."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: int


def load(path: Path | None, context: int) -> Text:
    """The text of a file, or CPython's help. Raises ValueError if a part has no window of `context + 1` characters."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = path.read_text(encoding="utf-8")
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    characters, numbers = np.unique(points, return_inverse=True)
    cut = round(len(numbers) * (1 - VALIDATION))
    if min(cut, len(numbers) - cut) < context + 1:
        raise ValueError(
            f"a text of {len(numbers)} characters is too short for windows of {context + 1} in its last tenth"
        )
    return Text(numbers[:cut], numbers[cut:], len(characters))


def batches(train: np.ndarray, context: int, batch: int, seed: int, rank: int, size: int) -> Iterator[np.ndarray]:
    """Endless windows of `context + 1` characters, this rank's part of `batch`. Together all sizes see the same."""
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(len(train) - context, size=batch)[rank::size]
        yield train[starts[:, None] + np.arange(context + 1)]


def windows(validation: np.ndarray, context: int, rank: int, size: int) -> np.ndarray:
    """This rank's part of the validation text, cut into windows of `context + 1` characters without overlap."""
    count = len(validation) // (context + 1)
    return validation[: count * (context + 1)].reshape(count, context + 1)[rank::size]

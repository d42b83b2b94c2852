"""Text data for word prediction: WikiText-2 from its files, and CPython's help texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

NAMES = (("wiki.train.tokens", "wiki.valid.tokens"), ("train.txt", "valid.txt"))
UNKNOWN, END = "<unk>", "<eos>"
LENGTH = 30  # words of truncated backpropagation, as in the authors' code


class Text(NamedTuple):
    """Word indices for training and testing, and the size of the vocabulary."""

    train: torch.Tensor
    test: torch.Tensor
    words: int


def wikitext2(path: Path) -> Text:
    """The training and the validation part of WikiText-2 in lower case; the training part's words are the vocabulary."""
    train, valid = ([*_lines(file.read_text(encoding="utf-8"))] for file in located(path))
    return numbered(train, valid)


def located(path: Path) -> list[Path]:
    """Returns the two files in `path` or its subfolder wikitext-2. Raises FileNotFoundError that names what is missing."""
    for folder in (path, path / "wikitext-2"):
        for names in NAMES:
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                return files
    wanted = " or ".join(" and ".join(names) for names in NAMES)
    raise FileNotFoundError(
        f"{path} holds no WikiText-2: it (or wikitext-2/ in it) must contain {wanted}, as in the archive wikitext-2-v1 of "
        "the WikiText long term dependency language modeling dataset (Merity et al., Salesforce), words split by blanks"
    )


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from line.lower().split()
        yield END


def topics(vocabulary: int, examples: int | None = None) -> Text:
    """Python's help: every tenth topic for testing, and the first `examples` words of the others, or all, for training."""
    from pydoc_data.topics import topics as texts

    names = sorted(texts)
    split = [[name for i, name in enumerate(names) if (i % 10 == 9) is test] for test in (False, True)]
    train, test = (re.findall(r"\w+|[^\w\s]", " ".join(texts[name] for name in part)) for part in split)
    return numbered(train[:examples], test, vocabulary)


def numbered(train: Sequence[str], test: Sequence[str], vocabulary: int | None = None) -> Text:
    """Converts words to indices: 0 for unknown words, then the training text's by frequency, at most `vocabulary`."""
    frequent = [word for word, _ in Counter(train).most_common() if word != UNKNOWN]
    numbers = {word: i for i, word in enumerate([UNKNOWN, *frequent][:vocabulary])}
    parts = [torch.tensor([numbers.get(word, 0) for word in words]) for words in (train, test)]
    return Text(parts[0], parts[1], len(numbers))


def streams(text: torch.Tensor, count: int, first: int, last: int) -> torch.Tensor:
    """Divides the text into `count` pieces of equal length, as columns of a (time, streams) matrix."""
    length = len(text) // count
    if length < 2:
        raise ValueError(f"a text of {len(text)} words is too short for {count} streams of at least 2")
    return text[: length * count].view(count, length)[first:last].T.contiguous()


def windows(columns: torch.Tensor, length: int = LENGTH) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields words and the words that follow them, `length` at a time."""
    for start in range(0, len(columns) - 1, length):
        end = min(start + length, len(columns) - 1)
        yield columns[start:end], columns[start + 1 : end + 1]

"""An aligned table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Of rows whose first is the header; all columns but the first are aligned to the right."""
    first, *others = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [[row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))] for row in cells]
    lines.insert(1, ["-" * first, *("-" * (w - 1) + ":" for w in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

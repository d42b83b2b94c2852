"""Findings of a check, one per line, and text tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """How a finding is judged."""

    OK = "ok"
    NOTE = "note"  # information without a judgement
    SLOW = "slow"  # works, but could be faster
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """The subject of a check, what was found, its verdict, and advice if it can be improved."""

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def text(findings: Iterable[Finding]) -> str:
    """Formats each finding as a line, followed by a line of advice if there is any."""
    lines = []
    for x in findings:
        lines.append(f"{x.verdict.value:<8}{x.subject:<30}{x.found}".rstrip())
        if x.advice:
            lines.append(f"{'':38}-> {x.advice}")
    return "\n".join(lines)


def broken(findings: Iterable[Finding]) -> bool:
    """Returns whether any finding is broken."""
    return any(x.verdict is Verdict.BROKEN for x in findings)


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Formats rows as aligned columns: those whose index is in `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)

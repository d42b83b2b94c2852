"""What a check finds, line by line, and tables of text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    OK = "ok"
    NOTE = "note"  # nothing to judge
    SLOW = "slow"  # works, but not as it could
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found there, whether that is well, and what to do where it isn't."""

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def text(findings: Iterable[Finding]) -> str:
    """A line for each finding, and one more for each advice."""
    lines = []
    for x in findings:
        lines.append(f"{x.verdict.value:<8}{x.subject:<30}{x.found}".rstrip())
        if x.advice:
            lines.append(f"{'':38}-> {x.advice}")
    return "\n".join(lines)


def broken(findings: Iterable[Finding]) -> bool:
    return any(x.verdict is Verdict.BROKEN for x in findings)


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns as wide as need be; those whose number is in `left` begin at the left, numbers end at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)

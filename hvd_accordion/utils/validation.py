"""Checks of arguments. Each returns the value, or raises an error that names argument, value and allowed values."""

from __future__ import annotations

import math
import numbers
from typing import Any


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]. TypeError if it is no integer, ValueError if it is out of range."""
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def real(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = True, open_high: bool = False
) -> float:
    """`value` as a finite float between `low` and `high`. TypeError if it is no number, ValueError if out of range."""
    right = ")" if open_high or high == math.inf else "]"
    allowed = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{right}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    number = float(value)
    if (
        not math.isfinite(number)
        or number < low
        or number > high
        or (open_low and number == low)
        or (open_high and number == high)
    ):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)

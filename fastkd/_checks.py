"""Checks of arguments: an error is one line that names the argument, its value and what is valid.

A value of a wrong type is a TypeError, one out of range a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["flag", "integer", "is_integer", "is_number", "number", "one_of", "probability"]


def is_integer(value: object) -> bool:
    """Whether it is an int, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, which True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int) -> int:
    """An int of at least `least`."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """A number in [least, most], and finite."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value <= most or math.isinf(value):
        interval = f"be at least {least:g} and finite" if math.isinf(most) else f"be in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must {interval}, got {value}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    return number(name, value, 0, 1)


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def one_of(name: str, value: Any, valid: Iterable[str]) -> None:
    """One of the names."""
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")

"""Checks of single values of settings; each raises a ValueError that says what was expected."""

import math
from collections.abc import Iterable
from typing import Any


def check_number(name: str, value: Any, *, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`, which may be infinite."""
    allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"from {low:g} up"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ValueError(f"{name} must be a number {allowed}; got {value!r:.100}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {allowed}; got {value:g}.")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_whole(name: str, value: Any, *, low: int, high: int) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}; got {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")

"""Options that count something."""

from __future__ import annotations

import operator
from typing import Any


def check_count(option: str, value: Any, *, least: int = 1) -> int:
    """Return `value` if it is a whole number of at least `least`.

    Raises:
        ValueError: If it is not; names the option and the value.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{option} is {value!r}; it must be a whole number") from None
    if number < least:
        raise ValueError(f"{option} is {number}; it must be at least {least}")
    return number

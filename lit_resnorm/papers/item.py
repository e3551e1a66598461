"""What an item of a paper is: settings, cells, checks and a figure.

A *cell* is the unit of work, a mapping of JSON values such as a depth and a seed. Its
run returns *rows*, flat mappings, and depends on settings, cell and base seed alone.
The rows of all cells, each with its cell's values, are the item's *curves*: what the
checks judge and the figure draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "Cell",
    "Check",
    "Item",
    "Row",
    "Settings",
    "all_of",
    "between",
    "cell_seed",
    "grid",
    "near",
    "not_shown",
    "ordered",
    "outcome",
]

Settings = Mapping[str, Any]
Cell = Mapping[str, Any]
Row = dict[str, Any]

MARKS = {
    "P": "published",
    "A": "abstract or captions only",
    "D": "derived here",
}
NOT_SHOWN = "not shown at this scale"


@dataclass(frozen=True)
class Check:
    """One statement of a verdict.

    Attributes:
        name: What is measured, with its unit.
        expected: The value, or the statement, that must come out.
        measured: What came out.
        tolerance: How far it may be off; None for a statement.
        passed: Whether it came out; None where the scale does not show the effect, as
            is known beforehand: neither a pass nor a fail.
        mark: Where the expectation comes from: `P`, `A` or `D`.
    """

    name: str
    expected: float | str
    measured: float | str
    tolerance: float | None
    passed: bool | None
    mark: str


@dataclass(frozen=True)
class Item:
    """A figure or table of a paper.

    Attributes:
        name: `<paper>.<figure>`.
        title: What it shows.
        source: The publication and the place in it.
        mark: Where its expectations come from: `P`, `A` or `D`.
        claim: What the source says, for the docs page.
        differs: What is done otherwise here, and why.
        scales: Settings of `small` and `full`, JSON values.
        cells: From settings to cells.
        run: From settings, cell and base seed to rows; found again by import.
        checks: From curves and settings to checks.
        figure: From curves and settings to a figure.
        data: Names of the data sets in `lit_resnorm.data` that `full` reads from disk.
        chosen: What of settings and checks was chosen after results were seen.
        failing: Why checks fail, where it is known that they do.
    """

    name: str
    title: str
    source: str
    mark: str
    claim: str
    differs: str
    scales: Mapping[str, Settings]
    cells: Callable[[Settings], Sequence[Cell]]
    run: Callable[[Settings, Cell, int], Sequence[Row]]
    checks: Callable[[pd.DataFrame, Settings], Sequence[Check]]
    figure: Callable[[pd.DataFrame, Settings], Figure]
    data: Sequence[str] = field(default=())
    chosen: str = ""
    failing: str = ""

    def __post_init__(self) -> None:
        if self.mark not in MARKS or set(self.scales) != {"small", "full"}:
            raise ValueError(
                f"{self.name}: mark {self.mark!r} must be one of {', '.join(MARKS)}, "
                f"scales small and full; got {', '.join(self.scales)}"
            )


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Return every combination of the axes' values, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def cell_seed(seed: int, *key: Any) -> int:
    """Return the seed that belongs to a base seed and a key of JSON values."""
    text = json.dumps([seed, *key], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def near(
    name: str,
    measured: float,
    expected: float,
    tolerance: float,
    mark: str,
    *,
    relative: bool = False,
) -> Check:
    """Return the check that a value is within a tolerance of the expected one.

    Args:
        name: What is measured, with its unit.
        measured: What came out; NaN fails.
        expected: What must come out.
        tolerance: Largest distance.
        mark: Where the expectation comes from.
        relative: Whether the tolerance is a share of the expected value.
    """
    width = tolerance * abs(expected) if relative else tolerance
    passed = abs(measured - expected) <= width
    return Check(name, expected, float(measured), width, bool(passed), mark)


def between(
    name: str, measured: float, low: float | None, high: float | None, mark: str
) -> Check:
    """Return the check that `low <= measured <= high`; None leaves a side open."""
    passed = (low is None or measured >= low) and (high is None or measured <= high)
    if low is None:
        expected = f"at most {high:.4g}"
    elif high is None:
        expected = f"at least {low:.4g}"
    else:
        expected = f"{low:.4g} to {high:.4g}"
    return Check(name, expected, float(measured), None, bool(passed), mark)


def ordered(name: str, values: Mapping[str, float], mark: str) -> Check:
    """Return the check that the values rise strictly in the mapping's order."""
    passed = all(a < b for a, b in pairwise(values.values()))
    measured = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
    return Check(name, " < ".join(values), measured, None, passed, mark)


def all_of(name: str, expected: str, held: int, total: int, mark: str) -> Check:
    """Return the check that a statement held in all of a number of cases."""
    passed = held == total and total > 0
    return Check(name, expected, f"{held} of {total}", None, passed, mark)


def not_shown(check: Check) -> Check:
    """Return a check of an effect that is known not to show at its scale.

    What was measured stays to be read, and counts neither way.
    """
    return replace(check, passed=None)


def outcome(checks: Sequence[Check]) -> bool | None:
    """Return whether an item came out as it must.

    None where it has checks, and none of them is of an effect that its scale shows.
    """
    decided = [check.passed for check in checks if check.passed is not None]
    if checks and not decided:
        return None
    return bool(decided) and all(decided)

"""Tables of items and verdicts, in which no name is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lit_resnorm.errors import escaped, printable
from lit_resnorm.papers.item import NOT_SHOWN

_WIDTH_OF_FILES = 1000
"""Columns of an output that is no terminal: no line is broken."""


def print_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    *,
    names: bool = True,
) -> None:
    """Print a table; off a terminal no line is broken.

    Args:
        titles: Of the columns.
        rows: Their cells.
        title: Of the table, as markup.
        names: Whether the first column holds names, which are never broken.
    """
    table = Table(title=title)
    if names:
        first = (titles[0], *(row[0] for row in rows))
        width = max(cell_len(printable(name)) for name in first)
        table.add_column(escaped(titles[0]), no_wrap=True, min_width=width)
    for heading in titles[1:] if names else titles:
        table.add_column(escaped(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(escaped, row))
    output().print(table)


def output() -> Console:
    """Return standard output, wide where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_FILES)


def print_verdict(verdict: dict[str, Any], folder: Path) -> None:
    """Print a verdict, check by check."""
    word = outcome_word(verdict["passed"], "passed", "FAILED")
    rows = [
        (
            check["name"],
            cell_text(check["expected"]),
            cell_text(check["measured"]),
            cell_text(check["tolerance"]),
            outcome_word(check["passed"], "pass", "FAIL"),
            check["mark"],
        )
        for check in verdict["checks"]
    ]
    title = escaped(f"{verdict['item']}: {verdict['title']}: {word}")
    columns = ("check", "expected", "measured", "tolerance", "", "mark")
    print_table(columns, rows, title, names=False)
    output().print(f"{verdict['seconds']:.1f} s of work; {escaped(folder)}")


def outcome_word(passed: bool | None, right: str, wrong: str) -> str:
    """Return the word for an outcome; that of None is the third one's own."""
    if passed is None:
        return NOT_SHOWN
    return right if passed else wrong


def checks_held(checks: Sequence[Mapping[str, Any]], of: str) -> str:
    """Return how many checks held, of those that their scale decides.

    Args:
        checks: As in `verdict.json`.
        of: What stands between the two numbers.
    """
    decided = [check["passed"] for check in checks if check["passed"] is not None]
    return f"{sum(decided)}{of}{len(decided)}"


def cell_text(value: float | str | None) -> str:
    """Return what a check's table shows of a number, a text or nothing."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"

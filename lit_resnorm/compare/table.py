"""The comparison in the terminal: what differs, the numbers, what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_STYLES = {"bad": "red", "warn": "yellow", "good": "green", "info": "dim"}
_MARKS = {"bad": "✗", "warn": "!", "good": "✓", "info": "·"}
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FEW = 8
"""Different values of a key that are listed; of more, how many there are."""


def print_comparison(document: Mapping[str, Any], console: Console) -> None:
    """Print a comparison: skipped runs, differences, the table, findings."""
    for one in document["skipped"]:
        line = f"skipped {one['name']}: {one['reason']}"
        console.print(line, style="yellow", markup=False, highlight=False)
    _print_differences(document, console)
    averaged = any(len(group["runs"]) > 1 for group in document["groups"])
    table = _groups_table(document) if averaged else _runs_table(document)
    console.print(table)
    for finding in document["findings"]:
        style = _STYLES[finding["severity"]]
        mark = f"[{style}]{_MARKS[finding['severity']]}[/]"
        place = finding["run"]
        name = "" if place is None else f"{document['runs'][place]['name']}: "
        line = f"{mark} {escape(name + finding['text'])}"
        if finding["source"]:
            line += f" [dim]({escape(finding['source'])})[/]"
        console.print(line, highlight=False)


def _print_differences(document: Mapping[str, Any], console: Console) -> None:
    if len(document["runs"]) < 2:
        return
    if not document["differences"]:
        console.print("configs: equal", highlight=False)
        return
    table = Table("differs", "values", box=None, padding=(0, 2, 0, 0))
    for one in document["differences"]:
        values = list(dict.fromkeys(map(_word, one["values"])))
        text = ", ".join(values[:_FEW])
        if len(values) > _FEW:
            text += f" and {len(values) - _FEW} more"
        table.add_row(escape(one["key"]), escape(text))
    console.print(table)


def _word(value: Any) -> str:
    return "-" if value is None else str(value)


def _runs_table(document: Mapping[str, Any]) -> Table:
    columns = document["columns"]
    table = _table(("run",), columns, document["table"]["runs"])
    for run, cells in zip(document["runs"], document["table"]["runs"], strict=True):
        row = [shown(cells[column["key"]], column["digits"]) for column in columns]
        table.add_row(escape(run["name"]), *map(escape, row))
    return table


def _groups_table(document: Mapping[str, Any]) -> Table:
    """Return a row a group: mean ± standard deviation; texts where all runs agree."""
    columns = document["columns"]
    rows = document["table"]["runs"]
    table = _table(("group", "runs"), columns, rows)
    pairs = zip(document["groups"], document["table"]["groups"], strict=True)
    for group, cells in pairs:
        row = []
        for column in columns:
            words = dict.fromkeys(rows[place][column["key"]] for place in group["runs"])
            if column["key"] in cells:
                row.append(_spread(cells[column["key"]], column["digits"]))
            else:
                row.append(", ".join(_word(word) for word in words))
        number = str(len(group["runs"]))
        table.add_row(escape(group["label"]), number, *map(escape, row))
    return table


def _table(
    first: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> Table:
    table = Table()
    for title in first:
        table.add_column(title, overflow="fold")
    for column in columns:
        cells = [row[column["key"]] for row in rows]
        text = any(isinstance(cell, str) and cell not in _NUMBERS for cell in cells)
        justify = "left" if text else "right"
        table.add_column(escape(column["title"]), justify=justify, overflow="fold")
    return table


def _spread(cell: Mapping[str, Any], digits: int) -> str:
    if cell["count"] == 0:
        return f"({cell['not_finite']} not finite)"
    text = shown(cell["mean"], digits)
    if cell["std"]:
        text += f" ± {shown(cell['std'], 2)}"
    return text + (f" ({cell['not_finite']} not finite)" if cell["not_finite"] else "")


def shown(value: Any, digits: int) -> str:
    """Return a cell as text: a number with so many significant digits."""
    if value is None:
        return ""
    if isinstance(value, str):
        return {"NaN": "NaN", "Infinity": "inf", "-Infinity": "-inf"}.get(value, value)
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"

"""The comparison in the terminal: what differs, the numbers, what they show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lit_resnorm.errors import escaped, printable
from lit_resnorm.quantities.explanations import reference
from lit_resnorm.runs.json_lines import NOT_FINITE

_STYLES = {"bad": "red", "warn": "yellow", "good": "green", "info": "dim"}
_SEVERITY_MARKS = {"bad": "✗", "warn": "!", "good": "✓", "info": "·"}
_FEW = 8
"""Different values of a key that are listed; of more, how many there are."""
_WORD = 200
"""Characters of a value that are printed; the page and the JSON have all."""
_KEYS = 100
"""Keys whose different values are printed; likewise."""
_WIDEST_NAME = 40
"""Width of names; longer ones take more lines."""
_MOST_FINDINGS = 40
"""Findings that are printed, the worst; the page and the JSON have all."""


def print_comparison(document: Mapping[str, Any], console: Console) -> None:
    """Print a comparison: skipped runs, differences, the table, findings, advice."""
    for one in document["skipped"]:
        line = printable(f"skipped {one['name']}: {one['reason']}")
        console.print(line, style="yellow", markup=False, highlight=False)
    for run in document["runs"]:
        if logs := run.get("logs"):
            line = printable(f"{run['name']}: one run with {len(logs)} logs")
            where = printable(", ".join(logs))
            console.print(f"{line} ({where})", markup=False, highlight=False)
    _print_differences(document, console)
    averaged = any(len(group["runs"]) > 1 for group in document["groups"])
    name, columns = _groups_columns(document) if averaged else _runs_columns(document)
    for table in _tables(name, columns, console.width):
        console.print(table)
    findings = document["findings"]
    for finding in findings[:_MOST_FINDINGS]:
        style = _STYLES[finding["severity"]]
        mark = f"[{style}]{_SEVERITY_MARKS[finding['severity']]}[/]"
        place = finding["run"]
        name = "" if place is None else f"{document['runs'][place]['name']}: "
        line = f"{mark} {escaped(name + finding['text'])}"
        sources = filter(None, (finding["source"], f"see {reference(finding['name'])}"))
        line += f" [dim]({escaped('; '.join(sources))})[/]"
        console.print(line, highlight=False)
    if len(findings) > _MOST_FINDINGS:
        console.print(
            f"and {len(findings) - _MOST_FINDINGS} more findings", highlight=False
        )
    _print_advice(document, console)


def _print_advice(document: Mapping[str, Any], console: Console) -> None:
    """Print once what to do about each kind of trouble that is among the findings."""
    names = dict.fromkeys(
        finding["name"]
        for finding in document["findings"][:_MOST_FINDINGS]
        if finding["severity"] in ("bad", "warn")
    )
    if names:
        console.print("\nWhat to do:", highlight=False)
    for name in names:
        one = document["explanations"][name]
        line = f"{escaped(one['title'])}: [dim]{escaped(one['advice'])}[/]"
        console.print(line, highlight=False)


def _print_differences(document: Mapping[str, Any], console: Console) -> None:
    if len(document["runs"]) < 2:
        return
    if not document["differences"]:
        console.print("configs: equal", highlight=False)
        return
    table = Table("differs", "values", box=None, padding=(0, 2, 0, 0))
    different = document["differences"]
    for one in different[:_KEYS]:
        values = list(dict.fromkeys(map(_cut_word, one["values"])))
        text = ", ".join(values[:_FEW])
        if len(values) > _FEW:
            text += f" and {len(values) - _FEW} more"
        table.add_row(escaped(one["key"]), escaped(text))
    console.print(table)
    if len(different) > _KEYS:
        console.print(f"and {len(different) - _KEYS} more keys", highlight=False)


def _cut_word(value: Any) -> str:
    word = "-" if value is None else str(value)
    return word if len(word) <= _WORD else word[:_WORD] + "..."


@dataclass(frozen=True)
class _Printed:
    """A column as it is printed."""

    title: str
    cells: list[str]
    is_text: bool = True

    @property
    def width(self) -> int:
        """Of its longest cell, and the longest word of its title."""
        words = [*self.cells, *self.title.split()]
        return max(cell_len(word) for word in words)


def _runs_columns(document: Mapping[str, Any]) -> tuple[_Printed, list[_Printed]]:
    """Return the names, and a column each."""
    rows = document["table"]["runs"]
    columns = [
        _Printed(
            column["title"],
            [shown(row[column["key"]], column["digits"]) for row in rows],
            _is_text(column, rows),
        )
        for column in document["columns"]
    ]
    return _Printed("run", [run["name"] for run in document["runs"]]), columns


def _groups_columns(document: Mapping[str, Any]) -> tuple[_Printed, list[_Printed]]:
    """Return labels, and mean ± standard deviation; texts as far as runs agree."""
    rows, groups = document["table"]["runs"], document["groups"]
    columns = [
        _Printed("runs", [str(len(group["runs"])) for group in groups], is_text=False)
    ]
    for column in document["columns"]:
        key, printed = column["key"], []
        pairs = zip(groups, document["table"]["groups"], strict=True)
        for group, cells in pairs:
            if key in cells:
                printed.append(_spread(cells[key], column["digits"]))
            else:
                words = dict.fromkeys(
                    _cut_word(rows[run][key]) for run in group["runs"]
                )
                printed.append(", ".join(words) if [*words] != ["-"] else "")
        columns.append(_Printed(column["title"], printed, _is_text(column, rows)))
    return _Printed("group", [group["label"] for group in groups]), columns


def _is_text(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    cells = [row[column["key"]] for row in rows]
    return any(isinstance(cell, str) and cell not in NOT_FINITE for cell in cells)


def _tables(name: _Printed, columns: Sequence[_Printed], width: int) -> Iterator[Table]:
    """Yield as many tables below each other as whole cells need."""
    name, *rest = (
        replace(one, title=printable(one.title), cells=[*map(printable, one.cells)])
        for one in (name, *columns)
    )
    while rest:
        taken = [rest.pop(0)]
        # a space at both edges, three between columns
        used = 2 + min(name.width, _WIDEST_NAME) + 3 + taken[0].width
        while rest and used + 3 + rest[0].width <= width:
            used += 3 + rest[0].width
            taken.append(rest.pop(0))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column(name.title, overflow="fold", max_width=_WIDEST_NAME)
        for column in taken:
            table.add_column(
                escaped(column.title),
                justify="left" if column.is_text else "right",
                min_width=column.width,
            )
        for row in zip(name.cells, *(column.cells for column in taken), strict=True):
            table.add_row(*map(escaped, row))
        yield table


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
        number = NOT_FINITE.get(value, math.nan)
        return value if math.isnan(number) else str(number)
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"

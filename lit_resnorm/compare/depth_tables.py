"""Values by site as a run's tables hold them, whatever kept the run."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_resnorm.compare.csv_logs import csv_value
from lit_resnorm.quantities import BY_DEPTH, SITE_KEY, SITE_KIND, WORST
from lit_resnorm.runs.files import TABLES
from lit_resnorm.runs.json_lines import rows_of
from lit_resnorm.runs.reading import lines, parsed_json, read_text

_LONGEST_KIND = 40


@dataclass(frozen=True)
class DepthTable:
    """A probe's values by site at one step.

    Attributes:
        step: Optimizer steps.
        prefix: First part of the values' names.
        rows: By site a cell a column: `kind`, a quantity each, `worst`.
    """

    step: int
    prefix: str
    rows: Mapping[str, Mapping[str, Any]]

    def values(self) -> dict[str, Any]:
        """Return them as a row of a history: `step`, and by name what is measured."""
        values: dict[str, Any] = {"step": self.step}
        for site, row in self.rows.items():
            for quantity, cell in row.items():
                key = f"{self.prefix}/{quantity}/{site}"
                told = quantity in (SITE_KIND, WORST)
                if cell not in (None, "") and not told and SITE_KEY.fullmatch(key):
                    values[key] = cell
        return values

    def kinds(self) -> dict[str, str]:
        """Return the kinds of the sites, as far as they are known."""
        found = {site: row.get(SITE_KIND) for site, row in self.rows.items()}
        return {
            site: kind
            for site, kind in found.items()
            if isinstance(kind, str) and 0 < len(kind) <= _LONGEST_KIND
        }


def depth_table(step: int, prefix: str, columns: Any, data: Any) -> DepthTable:
    """Return a table from what a logger was given.

    Args:
        step: Optimizer steps.
        prefix: First part of the values' names.
        columns: Names of columns, the first of which is `site`.
        data: Rows.

    Raises:
        ValueError: If it has no such form.
    """
    if (
        not isinstance(columns, Sequence)
        or not isinstance(data, Sequence)
        or not columns
        or columns[0] != "site"
        or not all(isinstance(name, str) for name in columns)
        or not all(isinstance(r, Sequence) and len(r) == len(columns) for r in data)
        or not all(isinstance(row[0], str) for row in data)
    ):
        raise ValueError(
            f"the table {prefix}/{BY_DEPTH} of step {step} is none by site"
        )
    rows = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in data}
    return DepthTable(step, prefix, rows)


def tables_in(folder: Path) -> Iterator[DepthTable]:
    """Yield the tables by site in a run directory.

    Raises:
        ValueError: If one is damaged.
    """
    for path in sorted(folder.glob(f"{TABLES}/*/{BY_DEPTH}.jsonl")):
        for row in rows_of(path):
            try:
                yield depth_table(
                    row["step"], path.parent.name, row.get("columns"), row.get("data")
                )
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def csv_tables_in(folder: Path) -> Iterator[DepthTable]:
    """Yield the tables by site in the folder of a logger of another kind.

    Raises:
        ValueError: If one is damaged.
    """
    for path in sorted(folder.glob(f"{TABLES}/*/{BY_DEPTH}.csv")):
        text = (line.decode() + "\n" for some in lines(path) for line in some)
        table = csv.reader(text)
        header = next(table, [])
        if header[:2] != ["step", "site"]:
            raise ValueError(f"{path}: it has no columns 'step', 'site'")
        for cells in table:
            if len(cells) != len(header) or not cells[0].isdecimal():
                raise ValueError(f"{path}, line {table.line_num}: it is no row of it")
            row = [cells[1], *(csv_value(cell) for cell in cells[2:])]
            yield depth_table(int(cells[0]), path.parent.name, header[1:], [row])


def json_table(step: int, key: str, path: Path) -> DepthTable:
    """Return a table that Weights & Biases keeps in a file.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        table = parsed_json(read_text(path))
        if not isinstance(table, dict):
            raise ValueError("it is no table")
        prefix = key.removesuffix(f"/{BY_DEPTH}")
        return depth_table(step, prefix, table.get("columns"), table.get("data"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

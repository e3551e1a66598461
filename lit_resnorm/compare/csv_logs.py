"""Runs of other projects, as Lightning's `CSVLogger` leaves them."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_resnorm.runs.reading import lines, read_yaml

METRICS = "metrics.csv"
HPARAMS = "hparams.yaml"
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_csv_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `metrics.csv`: a whole `step`, and what was logged.

    An empty cell is no value. A last line without its end, which a kill cut short, is
    left out.

    Raises:
        ValueError: If the file has no header with `step`, a line isn't one of it, or
            it can't be read.
    """
    path = folder / METRICS
    table = csv.reader(line.decode() + "\n" for some in lines(path) for line in some)
    try:
        header = next(table, [])
        if "step" not in header:
            raise ValueError("it has no column 'step'")
        place = header.index("step")
        for line in table:
            yield _checked_row(header, line, place)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {table.line_num}: {error}") from error


def _checked_row(header: list[str], line: list[str], place: int) -> dict[str, Any]:
    if len(line) != len(header):
        raise ValueError(f"not {len(header)} cells")
    if not line[place].lstrip("-").isdecimal():
        raise ValueError(f"step is {line[place]!r}")
    row: dict[str, Any] = {
        key: csv_value(cell) for key, cell in zip(header, line, strict=True) if cell
    }
    return {**row, "step": int(line[place])}


def csv_value(cell: str) -> Any:
    """Return the number that a cell holds, or its text."""
    try:
        return float(cell)
    except ValueError:
        return _NUMBERS.get(cell.lower(), cell)


def read_hparams(folder: Path) -> dict[str, Any]:
    """Return the content of `hparams.yaml`, empty where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / HPARAMS
    if not os.path.lexists(path):
        return {}
    try:
        config = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return config if isinstance(config, dict) else {}

"""Runs of other projects, as Lightning's `CSVLogger` leaves them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import yaml

METRICS = "metrics.csv"
HPARAMS = "hparams.yaml"
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class _Loader(yaml.SafeLoader):
    """Reads Python's tags as text: nothing of the file is run."""


def _as_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return node.value or suffix


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)


def read_csv_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.csv`: a whole `step`, and what was logged.

    An empty cell is no value. A last line without its end, which a kill cut short, is
    left out.

    Raises:
        ValueError: If the file has no header with `step`, or a line isn't one of it.
    """
    path = folder / METRICS
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = csv.reader(whole.splitlines())
    header = next(lines, [])
    if "step" not in header:
        raise ValueError(f"{path} has no column 'step'")
    place = header.index("step")
    rows = []
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"{path}, line {lines.line_num}: not {len(header)} cells")
        if not line[place].lstrip("-").isdecimal():
            raise ValueError(f"{path}, line {lines.line_num}: step is {line[place]!r}")
        row: dict[str, Any] = {
            key: _value(cell) for key, cell in zip(header, line, strict=True) if cell
        }
        rows.append({**row, "step": int(line[place])})
    return rows


def _value(cell: str) -> Any:
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
    if not path.exists():
        return {}
    try:
        # the loader makes plain values alone
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return config if isinstance(config, dict) else {}

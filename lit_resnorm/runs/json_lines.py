"""JSON-lines files, and values as JSON can hold them.

A line is an object with a whole `step`; files are replaced at one stroke. NaN and
infinities are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_resnorm.runs.reading import MOST_BYTES, MOST_LEVELS, lines

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The numbers that the words stand for."""


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it, a number that isn't finite as a word."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def plain_nest(value: Any) -> Any:
    """Return nested values as JSON holds them; what it doesn't know, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain_nest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_nest(item) for item in value]
    value = plain(value)
    known = value is None or isinstance(value, bool | int | float | str)
    return value if known else str(value)


def flat_values(values: Mapping[str, Any], levels: int = MOST_LEVELS) -> dict[str, Any]:
    """Return nested values flat, named as W&B shows them: `train.loss`.

    W&B's media, objects with a `_type`, stay as they are.

    Raises:
        ValueError: If they lie deeper than `levels`.
    """
    if not levels:
        raise ValueError(f"values lie more than {MOST_LEVELS} deep")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "_type" not in value:
            inner = flat_values(value, levels - 1)
            flat |= {f"{key}.{name}": one for name, one in inner.items()}
        else:
            flat[key] = value
    return flat


def whole_step(key: str, value: Any) -> int:
    """Return the step that is logged under a key.

    Raises:
        ValueError: If it isn't a whole number.
    """
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError(f"{key} is {value!r}, no whole number")


def row_line(row: Mapping[str, Any]) -> str:
    """Return one line of a JSON-lines file."""
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a last line cut short is left out.

    Raises:
        ValueError: If another line is no object with a whole `step`.
    """
    return list(rows_of(path, most=None))


def rows_of(path: Path, *, most: int | None = MOST_BYTES) -> Iterator[dict[str, Any]]:
    """Yield what `read_rows` returns, without holding it.

    Args:
        path: The file.
        most: Bytes that are read at most; None: all.

    Raises:
        ValueError: As there, or if the file can't be read within the bound.
    """
    number = 0
    for some in lines(path, most):
        yield from _parsed_rows(path, some, number)
        number += len(some)


def _parsed_rows(
    path: Path, some: Sequence[bytes], before: int
) -> Iterator[dict[str, Any]]:
    try:
        # all at once takes half the time
        rows = json.loads((b"[" + b",".join(some) + b"]").decode())
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(some) and all(map(_is_row, rows)):
        yield from rows
        return
    for number, line in enumerate(some, start=before + 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        if not _is_row(row):
            raise ValueError(f"{path}, line {number}: no object with a whole 'step'")
        yield row


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int


def checksum(rows: Iterable[Mapping[str, Any]], before: int = 0) -> int:
    """Return a checksum of rows in their order.

    Args:
        rows: The rows.
        before: Checksum of the rows before them.
    """
    for row in rows:
        before = zlib.crc32(row_line(row).encode(), before)
    return before


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Let a JSON-lines file hold `rows` alone."""
    text = "".join(map(row_line, rows))
    if text.encode() != path.read_bytes():
        replace_file(path, text)


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path`, which holds the old or the new text at any moment."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # else the name may be on the disk before the text is
        os.fsync(file.fileno())
    os.replace(new, path)

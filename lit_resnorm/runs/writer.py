"""Writes the growing files of a run directory (see `lit_resnorm.runs.files`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lit_resnorm.runs.files import FIGURES, HISTORY, TABLES
from lit_resnorm.runs.json_lines import (
    flat_values,
    plain,
    read_rows,
    replace_rows,
    row_line,
)


class RunWriter:
    """Appends rows, tables and figures to the files of a run directory.

    What earlier processes wrote stays: of a value or a table that the files hold up to
    some step, nothing is appended at that step again.

    Args:
        path: The run directory, made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        # last step of each key, and of each table, that earlier processes wrote
        self._kept: dict[str, int] = {}
        self._kept_tables: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a spawned process can't be given."""
        return {**self.__dict__, "_file": None}

    def go_on(self, steps: int, epoch: int, *, resumed: bool) -> None:
        """Drop what was logged after the weights that a fit starts with.

        Args:
            steps: Optimizer steps that they have taken.
            epoch: Epoch of the first batch to come.
            resumed: Whether they come from a checkpoint.

        Raises:
            ValueError: If the directory holds the steps of another run.
        """
        self.close()
        path = self.path / HISTORY
        self.path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
        else:
            rows = read_rows(path)
            if steps == 0 and not resumed and any(row["step"] for row in rows):
                raise ValueError(
                    f"save_dir {str(self.path)!r} holds another run: resume it with"
                    " ckpt_path, or choose another directory"
                )
            replace_rows(path, (row for row in rows if _is_before(row, steps, epoch)))
        for path in self.path.glob(f"{TABLES}/**/*.jsonl"):
            rows = read_rows(path)
            replace_rows(path, (row for row in rows if row["step"] <= steps))

    def add_row(self, step: int, epoch: Any, metrics: Mapping[str, Any]) -> None:
        """Append one line of values to the history, and hand it to the system."""
        file = self._open()
        values = {
            key: plain(value)
            for key, value in flat_values(metrics).items()
            if self._kept.get(key) != step
        }
        if values:
            file.write(row_line({"step": step, "epoch": plain(epoch), **values}))
            file.flush()

    def add_table(
        self, step: int, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]]
    ) -> None:
        """Append a table to `tables/<key>.jsonl`."""
        path = self._place(TABLES, key, ".jsonl")
        if path not in self._kept_tables:
            rows = read_rows(path) if path.exists() else []
            if rows:
                replace_rows(path, rows)
            self._kept_tables[path] = rows[-1]["step"] if rows else -1
        if step <= self._kept_tables[path]:
            return
        cells = [[plain(cell) for cell in row] for row in data]
        with path.open("a", encoding="utf-8") as file:
            row = {"step": step, "columns": list(columns), "data": cells}
            file.write(row_line(row))

    def write_images(self, key: str, images: Sequence[Any]) -> None:
        """Write `figures/<key>.png` anew; a second image goes to `<key>.1.png`."""
        for index, image in enumerate(images):
            path = self._place(FIGURES, key, f".{index}.png" if index else ".png")
            new = path.with_name(path.name + ".new")
            save = getattr(image, "savefig", None) or image.save
            save(new, format="png")
            os.replace(new, path)

    def close(self) -> None:
        """Close the history; what the files hold is read anew before the next line."""
        if self._file is not None:
            self._file.close()
        self._file, self._kept, self._kept_tables = None, {}, {}

    def _open(self) -> TextIO:
        if self._file is None:
            path = self.path / HISTORY
            self.path.mkdir(parents=True, exist_ok=True)
            if path.exists():
                rows = read_rows(path)
                replace_rows(path, rows)
                self._kept = {key: row["step"] for row in rows for key in row}
            self._file = path.open("a", encoding="utf-8")
        return self._file

    def _place(self, folder: str, key: str, ending: str) -> Path:
        path = self.path / folder / (key + ending)
        if not path.resolve().is_relative_to((self.path / folder).resolve()):
            raise ValueError(f"key {key!r} leads out of {folder}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _is_before(row: Mapping[str, Any], steps: int, epoch: int) -> bool:
    """Say whether a row was logged before a checkpoint at `steps`, in `epoch`."""
    if row["step"] != steps:
        return row["step"] < steps
    # the loss of the first batch after the checkpoint; rows at the end of the epoch
    # before have the same step and keep an earlier epoch
    is_train = any(key.startswith("train/") for key in row)
    return not (is_train and (row.get("epoch") or 0) >= epoch)

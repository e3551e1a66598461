"""Writes the growing files of a run directory (see `lit_resnorm.runs.files`)."""

from __future__ import annotations

import errno
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lit_resnorm.runs.files import FIGURES, HISTORY, TABLES
from lit_resnorm.runs.json_lines import (
    checksum,
    flat_values,
    plain,
    read_rows,
    replace_rows,
    row_line,
)
from lit_resnorm.runs.lock import hold, release


class RunWriter:
    """Appends rows, tables and figures to the files of a run directory.

    What earlier processes wrote stays: of a value or a table that the files hold up to
    some step, nothing is appended at that step again. While files are open, other
    processes are kept from writing them.

    Args:
        path: The run directory, made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._holds = False
        # number of rows in the history and their checksum, once it was read
        self._logged: tuple[int, int] | None = None
        # how often (step, key) is there already and may be given once more
        self._again: dict[tuple[int, str], float] = {}
        # last step of each table that earlier processes wrote
        self._kept_tables: dict[Path, int] = {}
        self._error: OSError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a spawned process can't be given."""
        return {**self.__dict__, "_file": None, "_holds": False}

    def go_on(
        self,
        steps: int,
        epoch: int,
        *,
        resumed: bool,
        logged: tuple[int, int] | None = None,
    ) -> bool:
        """Drop what was logged after the weights that a fit starts with.

        Args:
            steps: Optimizer steps that they have taken.
            epoch: Epoch of the first batch to come.
            resumed: Whether they come from a checkpoint.
            logged: What `logged` gave as the checkpoint was saved.

        Returns:
            Whether the history begins with the rows that `logged` tells of.

        Raises:
            ValueError: If the directory holds the steps of another run, or another
                process writes it.
        """
        self.close()
        self._error = None
        self._hold()
        path = self.path / HISTORY
        rows = read_rows(path) if path.exists() else []
        if steps == 0 and not resumed and any(row["step"] for row in rows):
            raise ValueError(
                f"save_dir {str(self.path)!r} holds another run: resume it with"
                " ckpt_path, or choose another directory"
            )
        number, known = logged or (0, 0)
        begins = logged is not None and checksum(rows[:number]) == known
        before = rows[:number] if begins else []
        after = [row for row in rows[len(before) :] if _is_before(row, steps, epoch)]
        path.touch()
        replace_rows(path, [*before, *after])
        self._logged = len(before) + len(after), checksum(after, known if begins else 0)
        self._again = _times_written(after) if begins else _last_steps(after)
        for path in self.path.glob(f"{TABLES}/**/*.jsonl"):
            rows = read_rows(path)
            replace_rows(path, (row for row in rows if row["step"] <= steps))
        return begins

    def logged(self) -> tuple[int, int]:
        """Return the number of rows in the history, and their checksum."""
        if self._logged is None:
            self._read()
        assert self._logged is not None
        return self._logged

    def add_row(self, step: int, epoch: Any, metrics: Mapping[str, Any]) -> None:
        """Append one line of values to the history, and hand it to the system.

        Raises:
            OSError: If it can't be written; so do all rows that follow.
        """
        file = self._open()
        values = {
            key: plain(value)
            for key, value in flat_values(metrics).items()
            if not self._is_there(step, key)
        }
        if not values:
            return
        row = {"step": step, "epoch": plain(epoch), **values}
        with self._noting_errors(HISTORY):
            file.write(row_line(row))
            file.flush()
        number, known = self.logged()
        self._logged = number + 1, checksum([row], known)

    def _is_there(self, step: int, key: str) -> bool:
        times = self._again.get((step, key), 0)
        if times:
            self._again[step, key] = times - 1
        return bool(times)

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
        row = {"step": step, "columns": list(columns), "data": cells}
        with self._noting_errors(path.name), path.open("a", encoding="utf-8") as file:
            file.write(row_line(row))

    def write_images(self, key: str, images: Sequence[Any]) -> None:
        """Write `figures/<key>.png` anew; a second image goes to `<key>.1.png`."""
        for index, image in enumerate(images):
            path = self._place(FIGURES, key, f".{index}.png" if index else ".png")
            new = path.with_name(path.name + ".new")
            save = getattr(image, "savefig", None) or image.save
            with self._noting_errors(path.name):
                save(new, format="png")
                os.replace(new, path)

    def close(self) -> None:
        """Close the history; what the files hold is read anew before the next line.

        Raises:
            OSError: If a line couldn't be written, or the history isn't there.
        """
        file, self._file = self._file, None
        self._logged, self._again, self._kept_tables = None, {}, {}
        if self._holds:
            self._holds = False
            release(self.path)
        if file is not None:
            with suppress(OSError):  # which is raised below
                self._close(file)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _close(self, file: TextIO) -> None:
        path = self.path / HISTORY
        with file, self._noting_errors(HISTORY):
            opened = os.fstat(file.fileno())
            if not (path.exists() and os.path.samestat(opened, path.stat())):
                raise FileNotFoundError(errno.ENOENT, "it was taken away", str(path))

    @contextmanager
    def _noting_errors(self, name: str) -> Iterator[None]:
        """Remember an error in writing, whoever catches it; then write no more."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except OSError as error:
            path = str(self.path / name)
            self._error = type(error)(error.errno, error.strerror, path)
            raise self._error from error

    def _hold(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._holds:
            hold(self.path)
            self._holds = True

    def _read(self) -> None:
        path = self.path / HISTORY
        rows = read_rows(path) if path.exists() else []
        self._logged, self._again = (len(rows), checksum(rows)), _last_steps(rows)

    def _open(self) -> TextIO:
        if self._file is None:
            self._hold()
            path = self.path / HISTORY
            if path.exists():
                # without a last line that a kill cut short
                replace_rows(path, read_rows(path))
            self.logged()
            self._file = path.open("a", encoding="utf-8")
        return self._file

    def _place(self, folder: str, key: str, ending: str) -> Path:
        path = self.path / folder / (key + ending)
        if not path.resolve().is_relative_to((self.path / folder).resolve()):
            raise ValueError(f"key {key!r} leads out of {folder}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _times_written(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """Return how often each value is there, by step and key."""
    return dict(Counter((row["step"], key) for row in rows for key in row))


def _last_steps(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """Return each key's last step, at which nothing more is wanted."""
    last = {key: row["step"] for row in rows for key in row}
    return {(step, key): math.inf for key, step in last.items()}


def _is_before(row: Mapping[str, Any], steps: int, epoch: int) -> bool:
    """Say whether a row was logged before a checkpoint at `steps`, in `epoch`."""
    if row["step"] != steps:
        return row["step"] < steps
    # the loss of the first batch after the checkpoint; rows at the end of the epoch
    # before have the same step and keep an earlier epoch
    is_train = any(key.startswith("train/") for key in row)
    return not (is_train and (row.get("epoch") or 0) >= epoch)

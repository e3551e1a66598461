"""Find and read the runs that a user names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from lit_resnorm.compare.config import flat_config, parted_config
from lit_resnorm.compare.csv_logs import (
    HPARAMS,
    METRICS,
    read_csv_rows,
    read_hparams,
)
from lit_resnorm.compare.depth_tables import (
    DepthTable,
    csv_tables_in,
    json_table,
    tables_in,
)
from lit_resnorm.compare.online import ADDRESS, online_runs, recorded_online
from lit_resnorm.compare.recorded import Recorded, RunKind, recorded_of_rows
from lit_resnorm.compare.several_logs import with_logs_joined
from lit_resnorm.quantities import declared_quantities
from lit_resnorm.runs.files import (
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    SUMMARY,
    read_logged_config,
    read_summary,
)
from lit_resnorm.runs.json_lines import rows_of
from lit_resnorm.runs.wandb_offline import find_offline_runs, read_offline_run

Skipped = dict[str, str]
"""`name` and `reason` of what could not be read."""

_DEEP = 4
"""Levels of folders in which runs are looked for."""

_LONGEST_REASON = 300
"""Characters of a reason."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a run lies.

    Attributes:
        kind: What it is.
        path: Its directory; of an offline W&B run the newest.
        run_id: Of an offline W&B run.
        folders: Its directories, the oldest first.
    """

    kind: RunKind
    path: Path
    run_id: str = ""
    folders: tuple[Path, ...] = ()


def read_runs(words: Iterable[str]) -> tuple[list[Recorded], list[Skipped]]:
    """Return the runs that words name, in their order, and what could not be read.

    A word is a run directory, an offline W&B run, a log of Lightning's CSVLogger, a
    folder of such ones, or `entity/project[/run]` on the W&B server where there is no
    such path. A run that is found twice counts once, and so does one that several
    loggers kept; an offline W&B run inside a run directory is not read beside it.
    Memory and time that a run takes are bounded; whatever it holds, it hinders no
    other.
    """
    runs: list[Recorded] = []
    skipped: list[Skipped] = []
    found: list[_Place | str] = []
    for word in words:
        try:
            os.lstat(word)
        except (FileNotFoundError, NotADirectoryError):
            if ADDRESS.fullmatch(word):
                found.append(word)
            else:
                skipped.append(_skipped(word, "no such file or directory"))
        except (OSError, ValueError) as error:
            skipped.append(_skipped(word, error))
        else:
            found += _places(Path(word), skipped)
    for name, read in _readers(_once(found), skipped):
        try:
            runs.append(read())
        # one run must not end the comparison of others, whatever is wrong with it
        except Exception as error:
            skipped.append(_skipped(name, error))
    return _told_apart(with_logs_joined(runs)), skipped


def _readers(
    places: Iterable[_Place | str], skipped: list[Skipped]
) -> Iterator[tuple[str, Callable[[], Recorded]]]:
    """Yield the name of each run, and what reads it."""
    for place in places:
        if isinstance(place, _Place):
            yield str(place.path), partial(_read, place)
            continue
        try:
            online = online_runs(place)
        except ValueError as error:
            skipped.append(_skipped(place, error))
            continue
        for address, run in online:
            yield address, partial(recorded_online, run, address)


def _skipped(name: str | Path, reason: str | Exception) -> Skipped:
    """Return why something is left out, in one line."""
    text = str(reason)
    if isinstance(reason, OSError) and reason.filename is not None:
        text = f"{reason.filename}: {reason.strerror}"
    elif not isinstance(reason, str | OSError | ValueError | ModuleNotFoundError):
        text = f"it can't be read ({type(reason).__name__}: {text})"
    text = " ".join(text.split())
    # what a file holds may be quoted in it
    text = text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
    return {"name": str(name), "reason": text}


def _once(found: Iterable[_Place | str]) -> list[_Place | str]:
    """Leave out what is found twice, and what lies in a run directory found too."""
    places: dict[str | Path, _Place | str] = {}
    for place in found:
        key = place if isinstance(place, str) else place.path.resolve()
        places.setdefault(key, place)
    directories = {
        key
        for key, place in places.items()
        if isinstance(place, _Place) and place.kind == "directory"
    }
    return [
        place
        for key, place in places.items()
        # <run>/wandb/offline-run-...
        if isinstance(key, str)
        or key.parent.parent not in directories
        or key.parent.name != "wandb"
    ]


def _places(path: Path, skipped: list[Skipped]) -> list[_Place]:
    """Return the runs under a path; note what looks like one and isn't."""
    if not path.is_dir():
        # a file of a run stands for the run
        if path.suffix != ".wandb" and path.name not in (HISTORY, METRICS):
            skipped.append(_skipped(path, "it is no run's"))
            return []
        path = path.parent
    before = len(skipped)
    places = list(_walk(path, skipped))
    if not places and len(skipped) == before:
        skipped.append(_skipped(path, _nothing_in(path)))
    return places


def _nothing_in(path: Path) -> str:
    return "it holds no run" if any(path.iterdir()) else "it is empty"


def _walk(path: Path, skipped: list[Skipped], levels: int = _DEEP) -> Iterator[_Place]:
    """Yield the runs in a folder, at most so many levels below it."""
    try:
        found = list(_here(path))
        inner = sorted(
            path / entry.name
            for entry in ([] if found else os.scandir(path))
            if entry.is_dir(follow_symlinks=False)
        )
        if not inner and not found and levels == _DEEP - 1:
            raise ValueError(_nothing_in(path))
    except (ValueError, OSError) as error:
        skipped.append(_skipped(path, error))
        return
    yield from found
    for folder in inner if levels else ():
        if levels == _DEEP or not folder.name.startswith("."):
            yield from _walk(folder, skipped, levels - 1)


def _here(path: Path) -> Iterator[_Place]:
    """Yield the runs that a directory itself holds.

    Whatever bears the name of a run's file counts: reading it says what it is.

    Raises:
        ValueError: If it looks like a run's and holds none.
    """
    names = set(os.listdir(path))
    if HISTORY in names:
        yield _Place("directory", path)
        return
    if METRICS in names:
        yield _Place("csv", path)
        return
    # a folder with a `wandb` folder in it may hold other runs too
    inner = (path / "wandb").is_dir()
    offline = {} if inner else find_offline_runs(path)
    for run_id, folders in offline.items():
        yield _Place("offline", folders[-1], run_id, tuple(folders))
    if not offline and not inner and names & {CONFIG, SUMMARY, CHECKPOINTS}:
        raise ValueError(f"it has no {HISTORY}")
    if not offline and HPARAMS in names:
        raise ValueError(f"it has no {METRICS}")


def _read(place: _Place) -> Recorded:
    """Return the run that lies at a place.

    Raises:
        ValueError: If it isn't one, or a file in it is damaged.
    """
    path = place.path
    name, summary = path.resolve().name, {}
    tables: Iterable[DepthTable]
    if place.kind == "csv":
        rows, raw, tables = read_csv_rows(path), read_hparams(path), csv_tables_in(path)
        # the folder alone is `version_0`
        name = "/".join(path.resolve().parts[-2:])
    elif place.kind == "directory":
        rows, raw = rows_of(path / HISTORY), read_logged_config(path)
        tables = tables_in(path)
        summary = read_summary(path)
    else:
        read = read_offline_run(place.run_id, place.folders)
        rows, raw, summary, name = read.rows, read.config, read.summary, read.name
        tables = (json_table(*one) for one in read.tables)
    config, quantities = parted_config(raw)
    quantities |= declared_quantities(summary.get("quantities"))
    return recorded_of_rows(
        rows,
        name=name,
        source=str(path),
        kind=place.kind,
        config=flat_config(config),
        summary=summary,
        quantities=quantities,
        tables=tables,
    )


def _told_apart(runs: list[Recorded]) -> list[Recorded]:
    """Give runs of one name their folder's too, or their source."""
    for rename in (_with_folder, lambda run: run.source):
        names = [run.name for run in runs]
        runs = [
            dataclasses.replace(run, name=rename(run))
            if names.count(run.name) > 1
            else run
            for run in runs
        ]
    return runs


def _with_folder(run: Recorded) -> str:
    if run.kind == "online":
        return run.source
    place = Path(run.source).resolve()
    place = place.parent.parent if run.kind == "offline" else place
    return f"{place.parent.name}/{run.name}"

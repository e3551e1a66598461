"""Find and read the runs that a user names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_resnorm.compare.config import flat_config, parted_config
from lit_resnorm.compare.csv_logs import METRICS, read_csv_rows, read_hparams
from lit_resnorm.compare.online import ADDRESS, read_online
from lit_resnorm.compare.recorded import Kind, Recorded, recorded_of_rows
from lit_resnorm.quantities import declared_quantities
from lit_resnorm.runs.files import CONFIG, HISTORY, SUMMARY, RunRows, read_run_rows
from lit_resnorm.runs.wandb_offline import find_offline_runs, read_offline_run

Skipped = dict[str, str]
"""`name` and `reason` of what could not be read."""

_SUMMARY = {"status": str, "verdicts": dict, "seconds": int | float | None}
"""Kinds of what a whole `summary.json` holds."""

_DEEP = 4
"""Levels of folders in which runs are looked for."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a run lies.

    Attributes:
        kind: What it is.
        path: Its directory; of an offline W&B run the newest.
        run_id: Of an offline W&B run.
        folders: Its directories, the oldest first.
    """

    kind: Kind
    path: Path
    run_id: str = ""
    folders: tuple[Path, ...] = ()


class _NothingError(ValueError):
    """A folder that looks like a run's and holds none."""


def read_runs(words: Iterable[str]) -> tuple[list[Recorded], list[Skipped]]:
    """Return the runs that words name, in their order, and what could not be read.

    A word is a run directory, an offline W&B run, a log of Lightning's CSVLogger, a
    folder of such ones, or `entity/project[/run]` on the W&B server where there is no
    such path. A run that is found twice counts once, and an offline W&B run inside a
    run directory is not read beside it.
    """
    runs: list[Recorded] = []
    skipped: list[Skipped] = []
    found: list[_Place | str] = []
    for word in words:
        if Path(word).exists():
            found += _places(Path(word), skipped)
        elif ADDRESS.fullmatch(word):
            found.append(word)
        else:
            skipped.append({"name": word, "reason": "no such file or directory"})
    for place in _once(found):
        try:
            runs += read_online(place) if isinstance(place, str) else [_read(place)]
        except (OSError, ValueError, ModuleNotFoundError) as error:
            name = place if isinstance(place, str) else str(place.path)
            skipped.append({"name": name, "reason": " ".join(str(error).split())})
    return _told_apart(runs), skipped


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
    if path.is_file():
        # a file of a run stands for the run
        if path.suffix != ".wandb" and path.name not in (HISTORY, METRICS):
            skipped.append({"name": str(path), "reason": "it is no run's"})
            return []
        path = path.parent
    places = list(_walk(path, skipped, _DEEP))
    if not places and not any(Path(s["name"]).is_relative_to(path) for s in skipped):
        empty = path.is_dir() and not any(path.iterdir())
        reason = "it is empty" if empty else "it holds no run"
        skipped.append({"name": str(path), "reason": reason})
    return places


def _walk(path: Path, skipped: list[Skipped], levels: int) -> Iterator[_Place]:
    try:
        found = list(_here(path))
        inner = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink())
    except (_NothingError, OSError) as error:
        skipped.append({"name": str(path), "reason": str(error)})
        return
    yield from found
    if found or not levels:
        return
    for folder in inner:
        if levels == _DEEP and not any(folder.iterdir()):
            skipped.append({"name": str(folder), "reason": "it is empty"})
        elif not folder.name.startswith("."):
            yield from _walk(folder, skipped, levels - 1)


def _here(path: Path) -> Iterator[_Place]:
    """Yield the runs that a directory itself holds."""
    if (path / HISTORY).is_file():
        yield _Place("directory", path)
        return
    if (path / METRICS).is_file():
        yield _Place("csv", path)
        return
    # a folder with a `wandb` folder in it may hold other runs too
    inner = path / "wandb"
    offline = {} if inner.is_dir() else find_offline_runs(path)
    for run_id, folders in offline.items():
        yield _Place("offline", folders[-1], run_id, tuple(folders))
    if offline or inner.is_dir():
        return
    if (path / CONFIG).is_file() or (path / SUMMARY).is_file():
        raise _NothingError(f"it has no {HISTORY}")


def _read(place: _Place) -> Recorded:
    if place.kind == "csv":
        rows = read_csv_rows(place.path)
        # the folder alone is `version_0`
        name = "/".join(place.path.resolve().parts[-2:])
        config, quantities = parted_config(read_hparams(place.path))
        run = recorded_of_rows(
            rows,
            name=name,
            source=str(place.path),
            kind="csv",
            status="",
            config=flat_config(config),
            quantities=quantities,
        )
    else:
        if place.kind == "directory":
            read = _run_rows(place.path)
        else:
            read = read_offline_run(place.run_id, place.folders)
        config, quantities = parted_config(read.config)
        quantities |= declared_quantities(read.summary.get("quantities"))
        run = recorded_of_rows(
            read.rows,
            name=read.name,
            source=str(place.path),
            kind=place.kind,
            status=read.summary["status"],
            config=flat_config(config),
            verdicts=read.summary["verdicts"],
            seconds=read.summary.get("seconds"),
            quantities=quantities,
        )
    return run


def _run_rows(path: Path) -> RunRows:
    """Return a run directory's rows.

    Raises:
        ValueError: If it isn't one, or a file in it is damaged.
    """
    file = path / SUMMARY
    if file.exists() and file.read_bytes().lstrip()[:1] != b"{":
        raise ValueError(f"{file} is damaged: it holds no object")
    read = read_run_rows(path)
    for key, kind in _SUMMARY.items():
        value = read.summary.get(key)
        if not isinstance(value, kind):
            raise ValueError(f"{file} is damaged: {key} is {value!r}")
    return read


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

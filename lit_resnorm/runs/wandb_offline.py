"""Reading W&B runs that were recorded offline, without a server.

A `run-<id>.wandb` file is a log in LevelDB's framing (blocks of 32 KiB; a record is
one whole chunk or first, middle and last ones, each with a checksum) of messages of
`wandb.proto`. A process that was killed leaves a torn tail, which is left out. A run
that was resumed offline leaves one directory a process, with the same id.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lit_resnorm.quantities import BY_DEPTH
from lit_resnorm.runs.files import RESUMED, STEP_KEY, Run, RunRows
from lit_resnorm.runs.json_lines import flat_values, plain, whole_step
from lit_resnorm.runs.reading import MOST_BYTES, MOST_LEVELS, parsed_json, pieces

_ENDINGS = ("status", "seconds")
_BLOCK_BYTES = 32768
_LONGEST_RECORD = 1 << 22
"""Bytes of a record that is read."""
_MOST_VALUES = 4_000_000
"""Values of a run that are read; a row counts as four."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(?P<id>.+)")


def run_ids(folder: Path) -> dict[str, list[Path]]:
    """Return the directories of the runs recorded in `folder`, by id, oldest first."""
    ids: dict[str, list[Path]] = {}
    # `latest-run` is a link to one of them
    for path in sorted(folder.glob("*run-*"), key=lambda p: p.name.split("run-")[1]):
        if _FOLDER.fullmatch(path.name) and not path.is_symlink():
            ids.setdefault(_run_id(path), []).append(path)
    return ids


def _run_id(folder: Path) -> str:
    # Two starts of a run in one second differ by a number at the folder's end, which
    # the file inside does not have.
    match = _FOLDER.fullmatch(folder.name)
    name = match["id"] if match else folder.name
    for file in sorted(folder.glob("run-*.wandb")):
        own = file.stem.removeprefix("run-")
        # a file of another run's name does not make it that run
        if name == own or re.fullmatch(re.escape(own) + r"-\d+", name):
            return own
    return name


def read_offline_wandb(path: str | os.PathLike[str]) -> list[Run]:
    """Return the runs recorded under `path`, one an id.

    Rows are joined by `trainer/global_step`, the `step` of the history; of a value
    that two processes logged at the same step the later process's is kept. Nested
    values are read as W&B shows them, `{"train": {"loss": 1}}` as `train.loss`.
    Tables, histograms and images are left out.

    Args:
        path: A `.wandb` file or the directory of one run (then other directories of
            the same id beside it are read too), or a directory with a `wandb`
            directory in it, or that directory itself.

    Raises:
        ValueError: If there is no offline run, or a file is damaged before its end.
        ModuleNotFoundError: If wandb isn't installed.
    """
    found = find_offline_runs(path)
    if not found:
        raise ValueError(f"{path} holds no offline W&B run")
    return [read_offline_run(i, folders).run() for i, folders in found.items()]


def find_offline_runs(path: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Return the directories of the runs recorded under `path`, by id.

    Args:
        path: As for `read_offline_wandb`.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".wandb" else path
    match = _FOLDER.fullmatch(folder.resolve().name)
    if match:
        wanted = _run_id(folder.resolve())
        return {wanted: run_ids(folder.resolve().parent)[wanted]}
    return run_ids(path / "wandb") or run_ids(path)


@dataclass
class _RunRecord:
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    tables: dict[tuple[int, str], Path] = field(default_factory=dict)
    size: int = 0
    ended: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    seconds: float = 0.0


def read_offline_run(run_id: str, folders: Iterable[Path]) -> RunRows:
    """Return the run of an id that was recorded in directories, the oldest first.

    Raises:
        ValueError: If a file is damaged before its end.
        ModuleNotFoundError: If wandb isn't installed.
    """
    recorded, latest = _RunRecord(), Path()
    for latest in folders:
        # how a process before ended says nothing of this one
        recorded.exit_code, recorded.ended = None, {}
        for file in latest.glob("*.wandb"):
            _take(file, recorded)
    rows = [recorded.rows[step] for step in sorted(recorded.rows)]
    recorded.config.pop("_wandb", None)
    words = {None: "interrupted", 0: "finished", 130: "interrupted"}
    if "variant" in recorded.config:
        words[3] = "diverged"  # our own command line's exit status
    summary = {
        "status": words.get(recorded.exit_code, "failed"),
        "verdicts": {},
        "seconds": recorded.seconds,
        **recorded.ended,
    }
    if summary["status"] == "running":
        # said amid a run, before the process ended in whatever way it did
        summary["status"] = words.get(recorded.exit_code, "failed")
    name = recorded.name or run_id
    tables = [(step, key, path) for (step, key), path in recorded.tables.items()]
    return RunRows(name, latest, recorded.config, rows, summary, tables)


def _take(file: Path, recorded: _RunRecord) -> None:
    """Add what one process recorded."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as pb

    for frame in _frames(file):
        try:
            record = pb.Record.FromString(frame)  # pyright: ignore[reportAttributeAccessIssue]
        except DecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        try:
            _take_record(record, recorded, file.parent / "files")
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error


def _take_record(record: Any, recorded: _RunRecord, media: Path) -> None:
    """Add a record; its checksum says nothing of what it holds.

    Args:
        record: The record.
        recorded: What it is added to.
        media: Folder of the files that records tell of.

    Raises:
        ValueError: If that makes no sense.
    """
    kind = record.WhichOneof("record_type")
    if kind == "run":
        recorded.name = record.run.display_name
        recorded.config |= _nested(record.run.config.update)
    elif kind == "config":
        config = _nested(record.config.update)
        if RESUMED in config:
            _cut_back(whole_step(RESUMED, config.pop(RESUMED)), recorded)
        recorded.config |= config
    elif kind == "summary":
        # as WandbHistory writes them when a run ends
        for item in record.summary.update:
            if item.key in _ENDINGS:
                recorded.ended[item.key] = parsed_json(item.value_json)
    elif kind == "exit":
        recorded.exit_code = record.exit.exit_code
        recorded.seconds += record.exit.runtime
    elif kind == "history":
        _take_row(_nested(record.history.item), recorded, media)


def _cut_back(step: int, recorded: _RunRecord) -> None:
    """Drop what processes before logged after the checkpoint that one began with."""
    for later in [other for other in recorded.rows if other > step]:
        del recorded.rows[later]
    for later in [other for other in recorded.tables if other[0] > step]:
        del recorded.tables[later]


def _take_row(values: dict[str, Any], recorded: _RunRecord, media: Path) -> None:
    key = STEP_KEY if values.get(STEP_KEY) is not None else "_step"
    step = whole_step(key, values.get(key, 0))
    values.pop(STEP_KEY, None)
    row = recorded.rows.setdefault(step, {"step": step, "epoch": None})
    flat = flat_values(values)
    row |= {
        key: plain(value)
        for key, value in flat.items()
        if not key.startswith("_") and not isinstance(value, dict | list)
    }
    for key, value in flat.items():
        path = table_file(key, value)
        # a run may have been copied without its files
        if path is not None and (media / path).is_file():
            recorded.tables[step, key] = media / path
    recorded.size += 4 + len(flat)
    if recorded.size > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES} values")


def table_file(key: str, value: Any) -> str | None:
    """Return where W&B keeps a logged table of values by site, under a run's files.

    None where it is another key, another kind of value, or no file of the run.
    """
    if not key.endswith(f"/{BY_DEPTH}") or not isinstance(value, dict):
        return None
    path = value.get("path")
    if value.get("_type") != "table-file" or not isinstance(path, str):
        return None
    place = PurePath(path)
    return None if place.is_absolute() or ".." in place.parts else path


def _nested(items: Iterable[Any]) -> dict[str, Any]:
    """Return the values of key-value records, whose keys may be paths."""
    values: dict[str, Any] = {}
    for item in items:
        *folders, key = list(item.nested_key) or [item.key]
        if len(folders) > MOST_LEVELS:
            raise ValueError(f"values lie more than {MOST_LEVELS} deep")
        inner: Any = values
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{folder!r} is a value and a group of values")
        inner[key] = parsed_json(item.value_json)
    return values


def _frames(file: Path) -> Iterator[bytes]:
    """Yield the records of a file, without a torn one at its end.

    Raises:
        ValueError: If it is no file of W&B's, or a checksum before its end is wrong.
    """
    start, record = 0, bytearray()
    for block in _blocks(file):
        position = 0
        if start == 0:
            if block[:4] != b":W&B"[: len(block)]:
                raise ValueError(f"{file} is no W&B run file")
            position = 7
        while position + 7 <= len(block):
            checksum, length, kind = struct.unpack_from("<IHB", block, position)
            if (kind, length) == (0, 0):
                break
            data = block[position + 7 : position + 7 + length]
            if len(data) < length and len(block) < _BLOCK_BYTES:
                return
            if len(data) < length or _sum(kind, data) != checksum:
                raise ValueError(f"{file} is damaged at byte {start + position}")
            position += 7 + length
            if kind in (_FULL, _FIRST):
                record.clear()
            record += data
            if len(record) > _LONGEST_RECORD:
                raise ValueError(
                    f"{file}: a record is longer than {_LONGEST_RECORD} bytes"
                )
            if kind in (_FULL, _LAST):
                yield bytes(record)
        start += len(block)


def _sum(kind: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(bytes([kind])))


def _blocks(file: Path) -> Iterator[bytes]:
    rest = b""
    for piece in pieces(file, MOST_BYTES):
        content = rest + piece
        whole = len(content) - len(content) % _BLOCK_BYTES
        for place in range(0, whole, _BLOCK_BYTES):
            yield content[place : place + _BLOCK_BYTES]
        rest = content[whole:]
    yield rest

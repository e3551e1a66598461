"""Where runs lie: `<root>/<experiment>/<run>`, made for a new run or found again."""

from __future__ import annotations

import re
import shutil
import zipfile
from datetime import datetime
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_info

from lit_resnorm.errors import printable
from lit_resnorm.runs.checkpoints import load_checkpoint, newest_first, saved_at
from lit_resnorm.runs.files import CHECKPOINTS, FIGURES, HISTORY, SUMMARY, TABLES
from lit_resnorm.runs.reading import parsed_json, read_text

REQUEUED = "hpc_ckpt_*.ckpt"
"""Checkpoints that Lightning saves where SLURM requeues a job, in the run directory."""
_RUN_NAME = re.compile(r"[^\W_][\w .+=@-]{0,99}")


def check_name(option: str, name: str) -> str:
    """Return a name that can be a directory's.

    Raises:
        ValueError: If it could lead elsewhere, or can't be read.
    """
    if not _RUN_NAME.fullmatch(name) or name != name.strip():
        raise ValueError(
            f"{option} is {name!r}: it must start with a letter or digit, and hold at"
            " most 100 letters, digits, spaces and . _ + = @ -"
        )
    return name


def new_run(folder: Path, name: str | None) -> Path:
    """Make and return the directory of a new run in an experiment's folder.

    Args:
        folder: The experiment's folder.
        name: Name of the run; None: a time stamp, with a number where it is taken.

    Raises:
        ValueError: If the name is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        suffix = f"-{number}" if number > 1 else ""
        path = folder / (name or stamp + suffix)
        try:
            path.mkdir()
        except FileExistsError as error:
            if name is not None:
                raise ValueError(
                    f"--run {name}: {path} exists; go on with it by --ckpt_path last,"
                    " or choose another name"
                ) from error
            number += 1
        else:
            return path


def known_run(folder: Path, name: str | None) -> Path:
    """Return the directory of a run that has a checkpoint, by default the newest.

    Raises:
        ValueError: If there is none.
    """
    if name is not None:
        if not (folder / name).is_dir():
            raise ValueError(f"--run {name}: there is no run {folder / name}")
        return folder / name
    runs = [path for path in folder.glob("*/") if checkpoints(path)]
    if not runs:
        raise ValueError(f"--ckpt_path last: there is no run with one in {folder}")
    return max(runs, key=lambda path: saved_at(checkpoints(path)[0]))


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first; `last` before others of its age."""
    return newest_first([*run.glob(f"{CHECKPOINTS}/*.ckpt"), *run.glob(REQUEUED)])


def last_checkpoint(run: Path, *, weights_only: bool = True) -> Path:
    """Return the newest checkpoint of a run that is whole.

    A process that was killed while it wrote one leaves the one before.

    Args:
        run: The run's directory.
        weights_only: As for `load_checkpoint`.

    Raises:
        ValueError: If there is none.
    """
    damaged = []
    for path in checkpoints(run):
        try:
            load_checkpoint(path, weights_only=weights_only)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            rank_zero_info(printable(f"{reason}; going on from {path}"))
        return path
    if damaged:
        raise ValueError(
            f"--ckpt_path last: no checkpoint of {run} can be read (the newest:"
            f" {damaged[0]})"
        )
    raise ValueError(f"--ckpt_path last: {run} has no checkpoint")


def has_not_begun(run: Path) -> bool:
    """Say whether a run was broken off before its first checkpoint was written."""
    if any(zipfile.is_zipfile(path) for path in checkpoints(run)):
        return False
    try:
        summary = parsed_json(read_text(run / SUMMARY))
    except (OSError, ValueError):
        return True
    ended = isinstance(summary, dict) and summary.get("status")
    return ended not in ("finished", "diverged")


def clear(run: Path) -> None:
    """Take away what a run directory holds of an earlier beginning."""
    saved = *run.glob(f"{CHECKPOINTS}/*.ckpt"), *run.glob(REQUEUED)
    for path in [*saved, run / HISTORY, run / SUMMARY]:
        path.unlink(missing_ok=True)
    for folder in (TABLES, FIGURES):
        shutil.rmtree(run / folder, ignore_errors=True)


def best_checkpoint(run: Path, *, weights_only: bool = True) -> Path:
    """Return the checkpoint that the run's ModelCheckpoint calls the best.

    Args:
        run: The run's directory.
        weights_only: As for `load_checkpoint`.

    Raises:
        ValueError: If there is none.
    """
    last = last_checkpoint(run, weights_only=weights_only)
    states = load_checkpoint(last, weights_only=weights_only).get("callbacks")
    for key, state in states.items() if isinstance(states, dict) else ():
        best = state.get("best_model_path") if isinstance(state, dict) else None
        if str(key).startswith("ModelCheckpoint") and isinstance(best, str):
            path = run / CHECKPOINTS / Path(best).name
            if path.is_file():
                return path
    raise ValueError(f"--ckpt_path best: {run} has no best checkpoint")

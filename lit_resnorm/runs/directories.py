"""Where runs lie: `<root>/<experiment>/<run>`, made for a new run or found again."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_resnorm.runs.files import CHECKPOINTS

VARIANT = "variant"
"""Key of a checkpoint: the class whose weights it holds."""
_NAME = re.compile(r"[^\W_][\w .+=@-]{0,99}")


def check_name(option: str, name: str) -> str:
    """Return a name that can be a directory's.

    Raises:
        ValueError: If it could lead elsewhere, or can't be read.
    """
    if not _NAME.fullmatch(name) or name != name.strip():
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
    return max(runs, key=lambda path: _time(checkpoints(path)[0]))


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first; `last` before others of its age."""
    found = [path for path in run.glob(f"{CHECKPOINTS}/*.ckpt") if path.exists()]
    return sorted(
        found, key=lambda p: (_time(p), p.stem.startswith("last")), reverse=True
    )


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def last_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run that is whole.

    A process that was killed while it wrote one leaves the one before.

    Raises:
        ValueError: If there is none.
    """
    found = checkpoints(run)
    for path in found:
        try:
            load_checkpoint(path)
        except ValueError:
            continue
        return path
    if found:
        raise ValueError(f"--ckpt_path last: every checkpoint of {run} is damaged")
    raise ValueError(f"--ckpt_path last: {run} has no checkpoint")


def best_checkpoint(run: Path) -> Path:
    """Return the checkpoint that the run's ModelCheckpoint calls the best.

    Raises:
        ValueError: If there is none.
    """
    states = load_checkpoint(last_checkpoint(run)).get("callbacks", {})
    for key, state in states.items():
        path = run / CHECKPOINTS / Path(state.get("best_model_path") or "").name
        if key.startswith("ModelCheckpoint") and path.is_file():
            return path
    raise ValueError(f"--ckpt_path best: {run} has no best checkpoint")


def load_checkpoint(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Return a checkpoint; tensors stay in the file until they are used.

    Args:
        path: The file.
        weights_only: Whether to refuse what could run code.

    Raises:
        ValueError: If there is no file, or it is truncated or something else.
    """
    if not path.is_file():
        raise ValueError(f"--ckpt_path {path}: there is no such file")
    # the directory of a zip file is at its end
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--ckpt_path {path}: it is truncated, or no checkpoint")
    try:
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=weights_only, mmap=True
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--ckpt_path {path}: it holds more than tensors and plain values"
            " (--weights_only false loads it, and runs what code it holds)"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"--ckpt_path {path}: it is damaged ({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt_path {path}: it holds no state_dict")
    return checkpoint


def check_checkpoint(
    path: Path, module: nn.Module, *, weights_only: bool = True
) -> None:
    """Raise ValueError unless a checkpoint is whole and fits the module."""
    if path.is_dir():
        return  # a sharded one, which its strategy checks
    checkpoint = load_checkpoint(path, weights_only=weights_only)
    own = type(module).__name__
    saved = checkpoint.get(VARIANT, own)
    reason = _difference(checkpoint["state_dict"], module.state_dict())
    if saved != own or reason:
        what = f"it is of {saved}, the model is {own}"
        if saved == own:
            what = f"it is of another {own} than the model"
        raise ValueError(
            f"--ckpt_path {path}: {what}" + (f" ({reason})" if reason else "")
        )


def _difference(
    saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> str:
    for key in [*saved, *own]:
        if key not in own:
            return f"the model has no {key}"
        if key not in saved:
            return f"the checkpoint has no {key}"
        shapes = tuple(saved[key].shape), tuple(own[key].shape)
        if shapes[0] != shapes[1]:
            return f"{key} is {shapes[0]} there and {shapes[1]} here"
    return ""

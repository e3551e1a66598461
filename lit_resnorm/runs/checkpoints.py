"""Reading checkpoints: whole ones alone, and of the model that is asked for.

A checkpoint is a zip archive with a checksum of each part. Since torch 2.1 it holds a
fingerprint of all checksums in their order, too, which tells exchanged parts.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

VARIANT = "variant"
"""Key of a checkpoint: the class whose weights it holds."""

_FINGERPRINT = ".data/serialization_id"
"""A part of 40 digits: a hash of names, then one of the checksums."""
_CHUNK = 1 << 20
_WORDS = 64


def load_checkpoint(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Return a checkpoint that is whole; tensors stay in the file until they are used.

    The file is read once to compare it with its checksums, unless it was saved without
    (`torch.serialization.set_crc32_options(False)`).

    Args:
        path: The file.
        weights_only: Whether to refuse what could run code.

    Raises:
        ValueError: If there is no file, or it is damaged or something else.
    """
    if not path.is_file():
        raise ValueError(f"--ckpt_path {path}: there is no such file")
    try:
        checkpoint = _loaded(path, weights_only=weights_only)
    except _UnreadableError as error:
        raise ValueError(f"--ckpt_path {path}: {error}") from error
    # what a damaged file, or the code of one that may run it, raises is not to be told
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"--ckpt_path {path}: it is damaged ({reason})") from error
    return checkpoint


class _UnreadableError(ValueError):
    """What is wrong with a checkpoint, without its name."""


def _loaded(path: Path, *, weights_only: bool) -> dict[str, Any]:
    # the directory of a zip file is at its end
    if not zipfile.is_zipfile(path):
        raise _UnreadableError("it is truncated, or no checkpoint")
    _check_sums(path)
    try:
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=weights_only, mmap=True
        )
    except pickle.UnpicklingError as error:
        # raised for anything that is no tensor or plain value, bytes without sense too
        found = get_unsafe_globals_in_checkpoint(path) if weights_only else []
        if not found:
            raise
        raise _UnreadableError(
            "it holds more than tensors and plain values"
            f" ({', '.join(sorted(found)[:3])};"
            " --weights_only false loads it, and runs what code it holds)"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise _UnreadableError("it holds no state_dict")
    weights = checkpoint["state_dict"]
    if not isinstance(weights, Mapping):
        raise _UnreadableError("its state_dict is no mapping of names to tensors")
    return checkpoint


def _check_sums(path: Path) -> None:
    """Raise _UnreadableError unless a file's parts are those that were saved."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise _UnreadableError("it is compressed, which no checkpoint is")
        if not any(part.CRC for part in parts):
            return
        for part in parts:
            try:
                with archive.open(part) as content:
                    while content.read(_CHUNK):
                        pass
            except (zipfile.BadZipFile, EOFError) as error:
                raise _UnreadableError(
                    f"it is damaged ({part.filename} is not what was saved)"
                ) from error
        _check_fingerprint(archive, parts)


def _check_fingerprint(archive: zipfile.ZipFile, parts: list[zipfile.ZipInfo]) -> None:
    """Raise _UnreadableError if parts were exchanged, added or left out."""
    *before, last = parts
    if not last.filename.endswith(_FINGERPRINT):
        return
    combined = 0
    for part in before:
        # c10::hash_combine, as PyTorchStreamWriter calls it for each part it writes
        mixed = part.CRC + 0x9E3779B9 + (combined << 6) + (combined >> 2)
        combined = (combined ^ mixed) % (1 << _WORDS)
    saved = archive.read(last)[20:]
    if saved != b"%020d" % combined:
        raise _UnreadableError("it is damaged (its parts were exchanged)")


def check_checkpoint(
    path: Path, module: nn.Module, *, weights_only: bool = True
) -> None:
    """Raise ValueError unless a checkpoint is whole and fits the module.

    Where it can't be read, the newest one beside it that can is named.
    """
    if path.is_dir():
        return  # a sharded one, which its strategy checks
    try:
        checkpoint = load_checkpoint(path, weights_only=weights_only)
    except ValueError as error:
        other = whole_checkpoint(path.parent, but=path)
        offer = f"; the newest whole one beside it is {other}" if other else ""
        raise ValueError(f"{error}{offer}") from error
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


def _difference(saved: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> str:
    for key in [*saved, *own]:
        if key not in own:
            return f"the model has no {key}"
        if key not in saved:
            return f"the checkpoint has no {key}"
        if not isinstance(saved[key], torch.Tensor):
            return f"{key} is {type(saved[key]).__name__} there, no tensor"
        shapes = tuple(saved[key].shape), tuple(own[key].shape)
        if shapes[0] != shapes[1]:
            return f"{key} is {shapes[0]} there and {shapes[1]} here"
    return ""


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return those that are files, the newest first; `last` before its equals."""
    found = [path for path in paths if path.is_file()]
    return sorted(
        found, key=lambda p: (saved_at(p), p.stem.startswith("last")), reverse=True
    )


def saved_at(path: Path) -> int:
    """Return when a file was written last, in nanoseconds."""
    return path.stat().st_mtime_ns


def whole_checkpoint(folder: Path, but: Path | None = None) -> Path | None:
    """Return a folder's newest checkpoint that is whole, None where there is none.

    Args:
        folder: Of checkpoints.
        but: Passed over, under whichever name it is there.
    """
    for path in newest_first(folder.glob("*.ckpt")):
        if but is not None and but.exists() and path.samefile(but):
            continue
        try:
            load_checkpoint(path)
        except ValueError:
            continue
        return path
    return None

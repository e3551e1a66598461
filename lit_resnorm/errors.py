"""Errors as one line that names the option or file at fault; exit statuses."""

from __future__ import annotations

import argparse
import difflib
import re
import sys

SUCCESS, FAILURE, WRONG_USE, PATHOLOGICAL, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses of the command line; a diverged run is pathological."""

_KEY = re.compile(r'Parser key "([^"]+)":')
# Messages of jsonargparse around the reason, which is their cause.
_WRAPPING = re.compile(
    r"[\s-]*(Parser key|Does not validate|Problem with given class_path"
    r"|Problems parsing config|Expected a path but)"
)
_REWORDED = (
    (r"Expected a dot import path string: (\S+)", r"unknown class '\1'"),
    (r"Expected a <class '(\w+)'>\. Got value: (.*)", r"expected \1, got '\2'"),
    (r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", r"\2 is none of \1"),
    (r"the following arguments are required: \w+\.(\w+)", r"--\1 is missing"),
    (r"expected \"subcommand\" to be one of (.*), but it was.*", r"no command of \1"),
)
_LONG = 500


class UsageError(ValueError):
    """Wrong use of the command line."""


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, UsageError):
        return str(error)
    keys: list[str] = []
    while True:
        text = str(error)
        key = _KEY.match(text)
        if key and key[1] not in keys[-1:]:
            keys.append(key[1])
        if error.__cause__ is None or not _is_wrapping(error):
            break
        error = error.__cause__
    line = re.sub(r"\s+", " ", text).strip() or type(error).__name__
    for pattern, words in _REWORDED:
        line = re.sub(pattern, words, line)
    bare = isinstance(error, LookupError | ArithmeticError | AttributeError)
    if bare and not type(error).__module__.startswith("jsonargparse"):
        line = f"{type(error).__name__}: {line}"
    line += _suggestion(line)
    line = line if len(line) <= _LONG else line[: _LONG - 3] + "..."
    return f"--{'.'.join(keys)}: {line}" if keys else line


def _is_wrapping(error: BaseException) -> bool:
    # commands that need no Lightning don't wait for its import
    if isinstance(error, argparse.ArgumentError) or (
        type(error).__name__ == "MisconfigurationException"
    ):
        return True
    return bool(_WRAPPING.match(str(error)))


def _suggestion(line: str) -> str:
    unknown = re.search(r"unknown class '(\w+)'", line)
    if not unknown or "lightning" not in sys.modules:
        return ""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    kinds: list[type] = [LightningModule, LightningDataModule, Callback]
    for kind in kinds:  # grows by the classes derived from those in it
        kinds.extend(kind.__subclasses__())
    close = difflib.get_close_matches(unknown[1], {kind.__name__ for kind in kinds})
    return f"; did you mean {' or '.join(close)}?" if close else ""

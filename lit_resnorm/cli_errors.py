"""Errors as one line that names the option or file at fault."""

from __future__ import annotations

import argparse
import re

import jsonargparse

# Lines of jsonargparse's messages that say which types were tried, and not what is
# wrong.
_NOISE = re.compile(
    r"(Does not validate|Subtypes:|Errors:|Given value type:|Given value:"
    r"|Not a valid subclass|Subclass types|Expected a <class 'NoneType'>"
    r"|Expected a List but|a class path|a dict|Expected a path but|Problem with given)"
)
_LONG = 600


class UsageError(ValueError):
    """Wrong use of the command line."""


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, jsonargparse.ArgumentError | argparse.ArgumentError):
        text = str(error)
    else:
        error = _cause(error)
        text = str(error) or type(error).__name__
        if not isinstance(error, ValueError | OSError | RuntimeError):
            text = f"{type(error).__name__}: {text}"
    lines = [line.strip().lstrip("- ") for line in text.splitlines()]
    told = [line for line in lines if line and not _NOISE.match(line)]
    line = re.sub(r"\s+", " ", " ".join(told or lines))
    return line if len(line) <= _LONG else line[: _LONG - 3] + "..."


def _cause(error: BaseException) -> BaseException:
    """Return the error that another one was raised from, the first of all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

"""Errors as one line that names the option or file at fault, exit statuses, and text.

Text of others is shown as a terminal may show it: nothing in it acts, hides or turns.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SUCCESS, FAILURE, WRONG_USE, PATHOLOGICAL, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses of the command line; a diverged run is pathological."""

_LONGEST_LINE = 500
_BEGINS = 0.8
"""Likeness of a name and its beginning, at least; the more of it is there, the more."""
_ALIKE, _AS_GOOD = 0.65, 0.05
"""Likeness from which a name is suggested, and how far it may be below the best."""


class UsageError(ValueError):
    """Wrong use of the command line."""


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, UsageError):
        return printable(" ".join(str(error).split()))
    # Lightning's, around what a user's own code raised
    while type(error).__name__ == "MisconfigurationException" and error.__cause__:
        error = error.__cause__
    line = " ".join(str(error).split()) or type(error).__name__
    # of these the text alone is a key, a number or a name
    if isinstance(error, LookupError | ArithmeticError | AttributeError):
        line = f"{type(error).__name__}: {line}"
    return shortened(printable(line))


def shortened(line: str) -> str:
    """Return a line that can be read at a glance."""
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def nearest(word: str, known: Iterable[str], *, number: int = 3) -> list[str]:
    """Return the known names that a misspelt one may stand for, the likeliest first.

    Whole names are compared, and the last of their parts: `--max_epochs` stands for
    `--trainer.max_epochs`. Capitals don't count.

    Args:
        word: What was given.
        known: What there is.
        number: How many to return at most.
    """
    likeness = {name: _likeness(word, name) for name in known}
    best = max(likeness.values(), default=0.0)
    bound = max(_ALIKE, best - _AS_GOOD)
    close = [name for name, value in likeness.items() if value >= bound]
    return sorted(close, key=lambda name: -likeness[name])[:number]


def _likeness(word: str, name: str) -> float:
    """Return how much alike two names are, from 0 to 1."""
    word, name = word.lower(), name.lower()
    parts = [one.rpartition(".")[2].lstrip("-") for one in (word, name)]
    whole = difflib.SequenceMatcher(None, word, name).ratio()
    last = difflib.SequenceMatcher(None, parts[0], parts[1]).ratio()
    if len(parts[0]) < 2 or not parts[1].startswith(parts[0]):
        return max(whole, last)
    return max(whole, last, _BEGINS + (1 - _BEGINS) * whole)


def suggestion(names: list[str]) -> str:
    """Return the end of an error that names what may have been meant."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def printable(text: object) -> str:
    r"""Return text with all that isn't printable escaped as in Python's strings.

    Escaped are control characters, of which terminals take commands (`\x1b`), marks of
    direction, which turn what stands around them (`\u202e`), what has no width or ends
    a line, and halves of characters that can't be written.

    Args:
        text: Names, values, messages; paths and errors too.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode()
        for one in text
    )


def escaped(text: object) -> str:
    """Return the same where rich reads markup: none of it is markup."""
    # not needed by commands that print no tables
    from rich.markup import escape

    return escape(printable(text))

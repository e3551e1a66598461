"""Text of others as a terminal may show it: nothing in it acts, hides or turns."""

from __future__ import annotations


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

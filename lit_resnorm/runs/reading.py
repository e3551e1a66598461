"""Files that anybody may have written: opened in one place, and bounded there.

Whatever a file holds, reading it ends, takes bounded memory and runs nothing; what
can't be read is a ValueError that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 28
"""Of a file of rows, which is read piece by piece."""

MOST_TEXT = 1 << 22
"""Of a line, and of a file that is read as a whole."""

MOST_LEVELS = 64
"""Of values within values."""

MOST_PARTS = 200_000
"""Of values within one JSON text."""

MOST_NODES = 20_000
"""Of values in a YAML text, those that it repeats by aliases counted each time."""

_PIECE = 1 << 20
# as far as the system has them
_FLAGS = os.O_RDONLY
for _name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY"):
    _FLAGS |= getattr(os, _name, 0)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}


def pieces(path: Path, most: int | None) -> Iterator[bytes]:
    """Yield the content of a regular file.

    What was opened is looked at, not what the name led to before; a FIFO or device is
    opened without waiting for it.

    Args:
        path: The file, or a link to it.
        most: Bytes that are read at most; None: all.

    Raises:
        ValueError: If it is no regular file, or holds more.
        OSError: If it can't be opened or read.
    """
    descriptor = os.open(path, _FLAGS)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise ValueError(f"{path} is {kind}, not a file")
    with open(descriptor, "rb", buffering=0) as file:
        # a sparse file says how much it would give; one of /proc says nothing
        read, size = 0, status.st_size
        while most is None or max(read, size) <= most:
            piece = file.read(_PIECE)
            if not piece:
                return
            read += len(piece)
            yield piece
    raise ValueError(
        f"{path} holds {max(read, size)} bytes, more than the {most} that are read"
    )


def lines(path: Path, most: int | None = MOST_BYTES) -> Iterator[list[bytes]]:
    r"""Yield the whole lines of a file, many at a time, without their `\n`.

    What follows the last `\n`, which a kill cut short, is left out.

    Raises:
        ValueError: As `pieces`, or if a line is longer than `MOST_TEXT` bytes.
    """
    rest = b""
    for piece in pieces(path, most):
        *whole, rest = (rest + piece).split(b"\n")
        if most is not None and len(rest) > MOST_TEXT:
            raise ValueError(f"{path}: a line is longer than {MOST_TEXT} bytes")
        yield whole


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Return a file's text.

    Raises:
        ValueError: As `pieces`, or if it isn't UTF-8.
    """
    return b"".join(pieces(path, most)).decode()


def parsed_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: If it is none, or holds too many values or values too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"values lie more than {MOST_LEVELS} deep") from error
    if isinstance(value, dict | list):
        check_size(value)
    return value


def check_size(value: Any) -> None:
    """Raise ValueError if a value holds too many others, or holds them too deep."""
    number, levels, level = 0, 0, [value]
    while level:
        number, levels = number + len(level), levels + 1
        if levels > MOST_LEVELS:
            raise ValueError(f"values lie more than {MOST_LEVELS} deep")
        if number > MOST_PARTS:
            raise ValueError(f"it holds more than {MOST_PARTS} values")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                inner.extend(one.values())
            elif isinstance(one, list | tuple):
                inner.extend(one)
        level = inner


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's own loader, where it was compiled in, is ten times as fast."""
_TAG = "tag:yaml.org,2002:"
_LONG_NUMBER = 400
_TEXT = 40
"""Characters that count as one value."""


class _Loader(_Base):
    """Makes mappings, lists and scalars alone, whatever the tags say."""


def _without_tag(loader: Any, tag: str, node: yaml.Node) -> Any:
    """Return what stands behind a tag that is no plain value's."""
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return node.value or tag.removeprefix(_TAG).removeprefix("python/")


def _number_or_text(loader: Any, node: yaml.Node) -> Any:
    """Return a number or a truth value; what isn't what its tag says is plain."""
    text = node.value if isinstance(node, yaml.ScalarNode) else ""
    # base 60 is how configs write times, not numbers
    if len(text) > _LONG_NUMBER or ":" in text:
        return text
    try:
        return _MADE[node.tag](loader, node)
    except (ValueError, LookupError, yaml.YAMLError):
        return _without_tag(loader, node.tag, node)


_MADE = {
    f"{_TAG}{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
    for kind in ("int", "float", "bool")
}
_Loader.yaml_constructors = {
    f"{_TAG}{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
    for kind in ("null", "str", "seq", "map")
} | dict.fromkeys(_MADE, _number_or_text)
_Loader.yaml_multi_constructors = {"": _without_tag}


def read_yaml(path: Path, most: int = MOST_NODES) -> Any:
    """Return what a YAML file holds, as mappings, lists and scalars; no tag runs code.

    Args:
        path: The file.
        most: Values, or so much text, that it may hold.

    Raises:
        ValueError: If it is no YAML, holds more, is too deep, or refers to itself.
    """
    text = read_text(path)
    try:
        check_nodes(text, most)
        # the loader makes plain values alone
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_nodes(text: str, most: int, loader: Any = _Base) -> None:
    """Raise ValueError if YAML is too deep, or its aliases make it too large.

    Args:
        text: The YAML.
        most: Values, or so much text, that it may hold once aliases are put in.
        loader: Whose parser reads it, and words what is wrong with it.

    Raises:
        yaml.YAMLError: If it is none.
    """
    total = 0
    sizes: dict[str, int] = {}
    # anchors of the collections that are open, and the total as they began
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value) // _TEXT
            total += size
            if event.anchor is not None:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in opened):
                raise ValueError(f"*{event.anchor} refers to itself")
            total += sizes.get(event.anchor, 0)
        if len(opened) > MOST_LEVELS:
            raise ValueError(f"values lie more than {MOST_LEVELS} deep")
        if total > most:
            raise ValueError(f"it holds more than {most} values, aliases put in")

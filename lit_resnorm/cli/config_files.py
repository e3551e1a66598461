"""Config files of a command line: whether they can be read, and where a key stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lit_resnorm.errors import UsageError
from lit_resnorm.runs.reading import check_nodes

_MOST_NODES = 1_000_000
"""Values in a config file, those behind aliases counted each time."""
_ARGUMENT_KEYS = ("init_args", "dict_kwargs")
"""Keys that options of the command line leave out."""


def config_files(args: Sequence[str]) -> Iterator[str]:
    """Yield the files that `--config` and `-c` name, in their order.

    Raises:
        UsageError: If no file follows.
    """
    words = iter(args)
    for word in words:
        option, equals, path = word.partition("=")
        if option in ("-config", "--c"):
            raise UsageError(f"there is no option {option}; did you mean --config?")
        if option not in ("--config", "-c"):
            continue
        path = path if equals else next(words, "")
        if not path or (not equals and path.startswith("--")):
            raise UsageError(f"{option}: the name of a file must follow")
        yield path


def check_config_files(args: Sequence[str]) -> None:
    """Raise UsageError for a config file that isn't there or is no mapping in YAML."""
    for path in config_files(args):
        try:
            text = Path(path).read_text(encoding="utf-8")
            check_nodes(text, _MOST_NODES, yaml.SafeLoader)
            config = yaml.safe_load(text)
        except OSError as error:
            raise UsageError(f"--config {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--config {path}: it is no text in UTF-8") from error
        except yaml.YAMLError as error:
            raise UsageError(f"--config {path}: {_broken(error)}") from error
        except ValueError as error:
            raise UsageError(f"--config {path}: {error}") from error
        if not isinstance(config, dict):
            raise UsageError(f"--config {path}: it holds no options")


def _broken(error: yaml.YAMLError) -> str:
    """Return where and how a file departs from YAML."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    reason = error.problem or error.context or "it is no YAML"
    hint = " (indent by spaces)" if r"'\t'" in reason else ""
    return f"{place}{' '.join(reason.split())}{hint}"


def place_of(key: str, args: Sequence[str]) -> str:
    """Return the file and line that set an option, as the end of an error.

    Empty where the command line sets it, or nothing does.

    Args:
        key: The option without dashes, such as `model.depth`.
        args: Words of the command line, whose config files can be read.
    """
    words = [word.partition("=")[0].rstrip("+") for word in args]
    if f"--{key}" in words:
        return ""
    for path in reversed([*config_files(args)]):
        root = yaml.compose(Path(path).read_text(encoding="utf-8"))
        line = root and _line(root, key.split("."))
        if line:
            return f" ({path}, line {line})"
    return ""


def _line(node: yaml.Node, parts: Sequence[str]) -> int | None:
    """Return the line of a key below a node, counted from 1."""
    if isinstance(node, yaml.SequenceNode):
        found = (_line(item, parts) for item in node.value)
        return next((line for line in found if line), None)
    if not isinstance(node, yaml.MappingNode) or not parts:
        return None
    for key, value in node.value:
        name = str(key.value).rstrip("+")
        if name in _ARGUMENT_KEYS:
            line = _line(value, parts)
        elif name != parts[0]:
            continue
        elif len(parts) == 1:
            line = key.start_mark.line + 1
        else:
            line = _line(value, parts[1:])
        if line:
            return line
    return None

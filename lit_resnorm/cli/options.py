"""Options of LightningCLI: a parser whose errors can be told in a line, and the line.

jsonargparse wraps what is wrong with a value in an error for each parser and type that
it passed: the innermost is the reason, and the parsers in between say whose options
were asked for.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lit_resnorm.cli.arguments import UNRECOGNIZED
from lit_resnorm.cli.config_files import config_files, place_of
from lit_resnorm.errors import nearest, one_line, shortened, suggestion


class OptionError(argparse.ArgumentError):
    """An error that knows the parser that it arose in."""

    def __init__(self, message: str, parser: OptionParser) -> None:
        super().__init__(None, message)
        self.parser = parser


class OptionParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are OptionErrors; a prefix is no option.

    jsonargparse makes more of it, one for the options of each class that is chosen.

    Attributes:
        subject: The class whose options these are; None: a command's.
    """

    subject: type | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_class_arguments(
        self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Add the options of a class, and note whose they are."""
        if nested_key is None:
            self.subject = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise OptionError."""
        raise OptionError(message, self) from ex

    def option_names(self) -> list[str]:
        """Return the options that there are, without dashes."""
        words = [word for action in self._actions for word in action.option_strings]
        return [word[2:] for word in words if word.startswith("--")]

    def type_of(self, name: str) -> Any:
        """Return the type of an option's value, None where it has none."""
        for action in self._actions:
            if action.dest == name:
                return getattr(action, "_typehint", action.type)
        return None


_MANY = 20
"""Options that are listed at most."""
_PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN = re.compile(
    r"(?:Option|(?:Subcommand|Group) '(?P<group>[^']+)' does not accept option)"
    r" '(?P<name>[^']+)'"
)
_WRAPPING = re.compile(
    r"[\s-]*(Parser key|Does not validate|Problem with given class_path"
    r"|Type \S+ expects a function)"
)
_HELP_SUFFIX = ".help"
_UNEXPECTED = "Unexpected config: "
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_ARGUMENT = re.compile(r"argument (?:\S+/)?(--\S+): expected one argument")
_VALUE = re.compile(r"Got value: (.*?)$|Given value: (.*?)$", re.MULTILINE)
_CLASS = re.compile(
    r"Expected a dot import path string: (?P<bare>.+)"
    r"|module '(?P<module>.+)' has no attribute '(?P<attribute>.+)'"
    r"|No module named '(?P<missing>.+)'"
    r"|Import path (?P<other>\S+) does not correspond"
    r"|Expected '(?P<another>\S+)' to be a (?:sub)?class"
)


@dataclass
class _Reason:
    """What is left of a chain of errors.

    Attributes:
        text: What the innermost says.
        path: The option that it is about, by parts.
        parser: The innermost parser.
        kind: The type that the option's value must have.
        value: The value that it has, as text; None: not told.
    """

    text: str = ""
    path: list[str] = field(default_factory=list)
    parser: OptionParser | None = None
    kind: Any = None
    value: str | None = None


def explained(error: BaseException, args: Sequence[str], more: Iterable[str]) -> str:
    """Return in one line what is wrong with a command line, and what was meant.

    Args:
        error: What the parser raised.
        args: Words of the command line.
        more: Further options, with dashes, that words before these may have been.
    """
    reason = _innermost(error, args[0] if args else "")
    text = " ".join(reason.text.split())
    option = "--" + ".".join(reason.path)
    if text.startswith(UNRECOGNIZED):
        return _unrecognized(text.removeprefix(UNRECOGNIZED), reason, args, more)
    if unknown := _UNKNOWN.match(text):
        return _no_such_option(unknown, reason, args)
    if required := _REQUIRED.search(text):
        return _missing(required[1].split(", "), reason)
    if text.startswith(_UNEXPECTED):
        return _holds_nothing(text.removeprefix(_UNEXPECTED), args)
    if needy := _NO_ARGUMENT.fullmatch(text):
        return f"{_without_value(needy[1], args)}: a value must follow"
    place = _place_of_class(".".join(reason.path), args)
    if reason.kind is not None:
        classes = [*_classes(reason.kind)]
        named = _CLASS.search(text)
        if (
            named
            and classes
            and (not _takes_plain_values(reason.kind) or _is_path(named))
        ):
            return f"{option}{place}: {_no_such_class(named, classes)}"
        if reason.value is not None and (named or "xpected" in text or "Union" in text):
            words = f"expected {_in_words(reason.kind)}, got {reason.value!r}"
            if get_origin(reason.kind) is Literal:
                choices = ", ".join(map(str, get_args(reason.kind)))
                words = f"{reason.value!r} is none of {choices}"
            return shortened(f"{option}{place}: {words}")
    asked = next(
        (word for word in args if word.partition("=")[0].endswith(_HELP_SUFFIX)), ""
    )
    if asked and (named := _CLASS.search(text)):
        kinds = [LightningModule, LightningDataModule, Callback, Logger]
        return f"{asked.partition('=')[0]}: {_no_such_class(named, kinds)}"
    for pattern, words in _REWORDED:
        text = re.sub(pattern, words, text)
    return shortened(f"{option}{place}: {text}" if reason.path else text)


def made_wrongly(error: BaseException) -> str:
    """Return in one line why something couldn't be made of its options.

    Args:
        error: What making it raised, with jsonargparse's words around it or without.
    """
    path: list[str] = []
    link = error
    while link.__cause__ is not None and _WRAPPING.match(str(link)):
        if key := _PARSER_KEY.match(str(link)):
            path.append(key[1])
        link = link.__cause__
    option = f"--{'.'.join(path)}: " if path else ""
    return shortened(f"{option}{one_line(link)}")


def _missing(names: Sequence[str], reason: _Reason) -> str:
    """Return which options a class needs."""
    subject = reason.parser.subject if reason.parser is not None else None
    if not reason.path or subject is None:
        return f"--{names[0].rpartition('.')[2]} is missing"
    options = ", ".join(f"--{'.'.join([*reason.path, name])}" for name in names)
    are = "is" if len(names) == 1 else "are"
    return f"{options} {are} missing, which {subject.__name__} needs"


def _holds_nothing(content: str, args: Sequence[str]) -> str:
    """Return which file has a key alone, of which jsonargparse gives the content."""
    for path in config_files(args):
        if " ".join(Path(path).read_text(encoding="utf-8").split()) == content:
            return f"--config {path}: {content.partition(':')[0]} has no value"
    return f"a config file has no value: {content}"


def _place_of_class(path: str, args: Sequence[str]) -> str:
    if not path:
        return ""
    return place_of(f"{path}.class_path", args) or place_of(path, args)


_REWORDED = (
    (r"^argument (-\S+): ", r"\1: "),
    (r"(Parser key \S+ )+", ""),
    (r"^'(.*)' not among choices (.*)", r"'\1' is none of \2"),
)


def _innermost(error: BaseException, command: str) -> _Reason:
    reason = _Reason()
    link: BaseException | None = error
    while link is not None:
        reason.text = str(link)
        if isinstance(link, OptionError):
            reason.parser = link.parser
        elif key := _PARSER_KEY.match(reason.text):
            parts = key[1].split(".")
            if reason.parser is not None:
                reason.kind = reason.parser.type_of(key[1])
            reason.path += parts[1:] if parts[0] == command else parts
        reason.parser = getattr(link, "subcommand_parser", reason.parser)
        values = [one or other for one, other in _VALUE.findall(reason.text)]
        reason.value = values[-1] if values else reason.value
        link = link.__cause__
    return reason


def _unrecognized(
    rest: str, reason: _Reason, args: Sequence[str], more: Iterable[str]
) -> str:
    word = next((arg for arg in args if rest.startswith(arg)), rest.split()[0])
    name = word.partition("=")[0]
    if name.endswith((".yaml", ".yml")):
        return f"{name!r} is no option; did you mean --config {name}?"
    known = [f"--{known}" for known in _every_option(reason.parser)]
    names = nearest(f"--{name.lstrip('-')}", [*known, *more])
    if f"--{name}" in known:
        names = [f"--{name}"]
    if name.startswith("--"):
        return f"there is no option {name}{suggestion(names)}"
    return f"{name!r} is no option; they begin with --{suggestion(names)}"


def _without_value(option: str, args: Sequence[str]) -> str:
    """Return the word of the command line that an option of a class was given by."""
    for word, after in zip(args, [*args[1:], "--"], strict=True):
        if word.startswith(option) and "=" not in word and after.startswith("--"):
            return word
    return option


def _every_option(parser: OptionParser | None) -> Iterator[str]:
    """Yield a parser's options, and those of models and data sets that are known."""
    if parser is not None:
        yield from parser.option_names()
    for group, base in (("model", LightningModule), ("data", LightningDataModule)):
        for kind in _derived(base):
            if kind.__module__.startswith("lit_resnorm."):
                for name in inspect.signature(kind).parameters:
                    yield f"{group}.{name}"
    yield from ("model.optimizer.lr", "model.optimizer.momentum")


def _no_such_option(unknown: re.Match, reason: _Reason, args: Sequence[str]) -> str:
    name = unknown["name"]
    if unknown["group"] and unknown["group"] != args[0]:
        name = f"{unknown['group']}.{name}"
    name = ".".join([*reason.path, name])
    parser = reason.parser
    known = parser.option_names() if parser is not None else []
    subject = parser.subject if parser is not None else None
    option = f"--{name}{place_of(name, args)}"
    names = nearest(unknown["name"], known)
    if subject is None:
        return (
            f"{option}: there is no such option"
            f"{suggestion([f'--{name}' for name in names])}"
        )
    if subject is Callback:
        return f"{option}: no callback stands before it (--trainer.callbacks+=NAME)"
    own = [one for one in known if not one.endswith("help")]
    has = suggestion(names) or f"; it has {', '.join(own[:_MANY])}"
    return f"{option}: {subject.__name__} has no such option{has}"


def _no_such_class(named: re.Match, classes: Sequence[type]) -> str:
    """Return what is wrong with a class name where one of some classes is expected."""
    known: dict[str, str] = {}
    for base in classes:
        for kind in _derived(base):
            if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
                known.setdefault(kind.__name__, f"{kind.__module__}.{kind.__name__}")
    if named["missing"]:
        return f"there is no module {named['missing']!r}"
    name = named["bare"] or named["attribute"] or named["other"] or named["another"]
    last = name.rpartition(".")[2]
    wanted = " or ".join(kind.__name__ for kind in classes)
    close = suggestion(nearest(last, known))
    if named["other"] or named["another"] or _is_known(last):
        return f"{name} is no {wanted}{close}"
    where = f" in {named['module']}" if named["module"] else ""
    return f"unknown class {name!r}{where}{close}"


def _is_known(name: str) -> bool:
    """Say whether this is a class of Lightning's or ours, of whatever kind."""
    bases = (LightningModule, LightningDataModule, Callback, Logger)
    return any(kind.__name__ == name for base in bases for kind in _derived(base))


def _derived(base: type) -> list[type]:
    kinds = [base]
    for kind in kinds:  # grows by the classes derived from those in it
        kinds += [one for one in kind.__subclasses__() if one not in kinds]
    return kinds


_WORDS_OF_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    Path: "a path",
}


def _members(kind: Any) -> Iterator[Any]:
    """Yield the types that a type is the union of."""
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _is_path(named: re.Match) -> bool:
    """Say whether a value that is no class was meant as one."""
    return not named["bare"] or named["bare"][:1].isupper()


def _takes_plain_values(kind: Any) -> bool:
    """Say whether a value can be something that no class path makes."""
    plain = {bool, int, float, str, list, tuple, dict}
    members = [*_members(kind)]
    return any(one in plain or get_origin(one) is Literal for one in members)


def _classes(kind: Any) -> Iterator[type]:
    """Yield the classes of which a class path can make a value of this type."""
    for member in _members(kind):
        origin = get_origin(member)
        if origin is Literal:
            continue
        arguments = get_args(member)
        if arguments:
            # of a function's type the result is what counts
            for argument in arguments[-1:]:
                if not isinstance(argument, list):
                    yield from _classes(argument)
        elif inspect.isclass(member) and member.__module__ not in (
            "builtins",
            "collections.abc",
            "typing",
            "pathlib",
        ):
            yield member


def _in_words(kind: Any) -> str:
    words: list[str] = []
    choices: list[str] = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            choices += [str(value) for value in get_args(member)]
            continue
        origin = get_origin(member) or member
        if origin in _WORDS_OF_TYPES:
            words.append(_WORDS_OF_TYPES[origin])
        elif origin in (Iterable, Sequence):
            words.append("a list")
        elif origin is not Tensor:  # which no text is
            words.append(getattr(origin, "__name__", str(origin)))
    if choices:
        words.append(f"one of {', '.join(dict.fromkeys(choices))}")
    return " or ".join(dict.fromkeys(words))

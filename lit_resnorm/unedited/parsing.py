"""Reading which probes a text or a YAML file names; nothing of it is evaluated."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import lit_resnorm_callbacks
from lit_resnorm.errors import nearest, suggestion
from lit_resnorm_callbacks import Probe

_OPENING, _CLOSING = "([{", ")]}"


def probes_named(text: str) -> list[Probe]:
    """Return the probes that a text names, each with its options.

    Args:
        text: Names of this package's probes, apart by spaces or commas, each with or
            without options in brackets, which are literals: `ActivationRateMonitor
            GradientMonitor(cadence=50)`. Or the path of a YAML file: a list of names
            and of mappings with `class_path` and `init_args`, or a config with such a
            list under `trainer.callbacks`.

    Raises:
        ValueError: If a name, an option or the form is not known.
        OSError: If the file can't be read.
    """
    if text.endswith((".yaml", ".yml")):
        named = [*_named_in_file(Path(text))]
    else:
        named = [_named_in(part) for part in _parts(text)]
    if not named:
        raise ValueError(f"{text!r} names no probe")
    probes = [_probe_made(name, options) for name, options in named]
    for probe in probes:
        probe.unedited = True
    return probes


def _parts(text: str) -> Iterator[str]:
    """Return the parts of a text that spaces or commas outside of brackets part."""
    part, depth, quote = "", 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in _OPENING) - (letter in _CLOSING) if not quote else 0
        if not quote and depth == 0 and (letter.isspace() or letter in ",;"):
            if part:
                yield part
            part = ""
        else:
            part += letter
    if part:
        yield part


def _named_in(part: str) -> tuple[str, dict[str, Any]]:
    try:
        found = ast.parse(part, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{part!r} is no name with options in brackets") from None
    if isinstance(found, ast.Name):
        return found.id, {}
    if not isinstance(found, ast.Call) or not isinstance(found.func, ast.Name):
        raise ValueError(f"{part!r} is no name with options in brackets")
    if found.args or any(keyword.arg is None for keyword in found.keywords):
        raise ValueError(f"{part!r}: options are written name=value")
    return found.func.id, {
        str(keyword.arg): _literal(keyword, part) for keyword in found.keywords
    }


def _literal(keyword: ast.keyword, part: str) -> Any:
    try:
        return ast.literal_eval(keyword.value)
    except (ValueError, TypeError, MemoryError, RecursionError):
        written = ast.get_source_segment(part, keyword.value)
        raise ValueError(
            f"{keyword.arg} is {written}; give a number, a text or another literal"
        ) from None


def _named_in_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if isinstance(found, Mapping):
        trainer = found.get("trainer")
        within = trainer if isinstance(trainer, Mapping) else {}
        found = within.get("callbacks+", within.get("callbacks"))
    if not isinstance(found, list):
        raise ValueError(f"{path} has no list of probes, nor one in trainer.callbacks")
    for entry in found:
        options: Any = {}
        name = entry
        if isinstance(entry, Mapping):
            name, options = entry.get("class_path"), entry.get("init_args") or {}
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ValueError(f"{path}: {entry!r} is no probe with its class_path")
        yield name.removeprefix("lit_resnorm_callbacks."), dict(options)


def _probe_made(name: str, options: Mapping[str, Any]) -> Probe:
    known = _shipped_probes()
    if name not in known:
        raise ValueError(
            f"there is no probe {name!r}{suggestion(nearest(name, known))}"
            f" (there are {', '.join(known)})"
        )
    taken = _options(known[name])
    if unknown := [option for option in options if option not in taken]:
        raise ValueError(
            f"{name} has no option {unknown[0]!r}"
            f"{suggestion(nearest(unknown[0], taken))}"
        )
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _shipped_probes() -> dict[str, type[Probe]]:
    exports = {
        n: getattr(lit_resnorm_callbacks, n) for n in lit_resnorm_callbacks.__all__
    }
    return {
        name: one
        for name, one in exports.items()
        if isinstance(one, type) and issubclass(one, Probe) and one is not Probe
    }


def _options(probe: type[Probe]) -> list[str]:
    """Return the options of a probe, of every class that it is made of."""
    found: dict[str, None] = {}
    for kind in probe.__mro__:
        if issubclass(kind, Probe):
            parameters = inspect.signature(kind.__init__).parameters.values()
            found |= {p.name: None for p in parameters if p.kind is not p.VAR_KEYWORD}

    return [name for name in found if name not in ("self", "args")]

"""What a config that lies beside a checkpoint may name, unless the user trusts it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_resnorm.errors import UsageError

TRUSTED = (
    "lit_resnorm",
    "lit_resnorm_callbacks",
    "torch",
    "torchvision",
    "lightning",
)
"""Packages whose classes a stranger's config may name: they are always installed."""

# of what isn't a class, these make networks and do no more
_TRUSTED_PACKAGES = ("lit_resnorm", "torchvision.models")


class Trust:
    """Refuses configs that name what lies outside the packages in `TRUSTED`.

    Nothing outside them is imported to find that out.

    Args:
        where: The option and file that names the config.
        words: Words of the command line; what the user names there is trusted.
    """

    def __init__(self, where: str, words: Sequence[str]) -> None:
        self._where = where
        self._words = {part for word in words for part in (word, *word.split("=", 1))}
        self.refusal: UsageError | None = None

    def check(self, config: Any) -> None:
        """Raise UsageError, which is kept, if a config names anything else.

        Args:
            config: What a text of YAML holds, a whole file or one value.
        """
        for name, is_class in _importable_names(config):
            if name in self._words or _is_ours(name, is_class):
                continue
            self.refusal = UsageError(
                f"{self._where} names {name}, which is none of ours, torch's,"
                " torchvision's or Lightning's: --trust imports it and runs its code"
            )
            raise self.refusal


def _importable_names(value: Any) -> Iterator[tuple[str, bool]]:
    """Yield what could be imported, and whether it stands as a class with options."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str) and "." in path:
            yield path.strip(), True
        for key, inner in value.items():
            if key != "class_path" or not isinstance(inner, str):
                yield from _importable_names(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _importable_names(inner)
    elif isinstance(value, str) and _is_dotted(value.strip()):
        yield value.strip(), False


def _is_dotted(text: str) -> bool:
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _is_ours(name: str, is_class: bool) -> bool:
    """Say whether a name leads nowhere but into the packages that are trusted."""
    root = name.partition(".")[0]
    if root not in TRUSTED:
        # other text may have dots too, such as a file's name
        return not is_class and not _is_module(root)
    found = _found(name)
    if found is None:
        return True
    # a package's module may hold another's, as `torch.os`
    origin = found.__name__ if inspect.ismodule(found) else _origin(found)
    if origin.partition(".")[0] not in (*TRUSTED, ""):
        return False
    return (
        inspect.isclass(found) or not is_class or origin.startswith(_TRUSTED_PACKAGES)
    )


def _is_module(root: str) -> bool:
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        return True


def _origin(found: Any) -> str:
    return getattr(found, "__module__", None) or ""


def _found(name: str) -> Any:
    """Return what a name in a trusted package leads to, None where to nothing."""
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    for part in rest.split("."):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ImportError:
                return None
        found = getattr(found, part, None)
        if inspect.ismodule(found) and found.__name__.partition(".")[0] not in TRUSTED:
            return found
    return found

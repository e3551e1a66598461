"""Variants that are declared: a base, what they fix of its options, other defaults."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["DeclaredVariant"]


class DeclaredVariant:
    """Lets a subclass fix options of its base and give others new defaults.

    `class Wide(Base, fixed={"depth": 2}, defaults={"width": 512})` has an `__init__`
    that takes what that of `Base` takes, but for `depth`; `--help` shows it so. Options
    that the base passes on as `**kwargs` can't be declared.
    """

    def __init_subclass__(
        cls,
        *,
        fixed: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if fixed or defaults:
            init = _declared_init(cls, fixed or {}, defaults or {})
            setattr(cls, "__init__", init)  # noqa: B010


def _declared_init(
    cls: type, fixed: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[..., None]:
    """Return the `__init__` that would else be written by hand.

    As source, because Lightning and jsonargparse read it: the one finds the arguments
    of a checkpoint in its frame, the other follows `**kwargs` to the base.

    Raises:
        TypeError: If the base has no such option.
    """
    base = super(cls, cls).__init__  # pyright: ignore[reportArgumentType]
    options = {
        name: option
        for name, option in inspect.signature(base).parameters.items()
        if option.kind is not option.VAR_KEYWORD and name != "self"
    }
    if unknown := {*fixed, *defaults} - {*options}:
        raise TypeError(f"{cls.__name__}: the base has no {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    takes, passes, annotations = ["self"], [], {}
    for name, option in options.items():
        keyword = option.kind is option.KEYWORD_ONLY
        if name in fixed:
            values[f"fixed_{name}"] = fixed[name]
            passes.append(f"{name}=fixed_{name}")
            continue
        if keyword and name not in defaults:
            continue  # one of **kwargs
        if keyword and "*" not in takes:
            takes.append("*")
        default = defaults.get(name, option.default)
        values[f"default_{name}"] = default
        has_default = default is not option.empty
        takes.append(f"{name}=default_{name}" if has_default else name)
        passes.append(f"{name}={name}" if keyword else name)
        annotations[name] = option.annotation
    source = (
        "def make(__class__):\n"
        f"    def __init__({', '.join(takes)}, **kwargs):\n"
        f"        super().__init__({', '.join(passes)}, **kwargs)\n"
        "    return __init__\n"
    )
    file = f"<{cls.__module__}.{cls.__qualname__}.__init__>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), values)
    init = values["make"](cls)
    init.__annotations__ = {**annotations, "kwargs": Any, "return": None}
    init.__module__, init.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    return init

"""State of a network that is kept in plain attributes, for each of its copies.

A hidden state, a moving mean or a counter that a forward pass updates without having
registered a buffer is an attribute of a module. Tensors, numbers, texts, and lists,
tuples and dicts of those are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Attributes = dict[str, Any]
"""Values by the module's name, a colon, and the attribute's."""

_PLAIN_TYPES = (int, float, complex, bool, str, bytes, type(None))
_OF_TORCH = frozenset(vars(nn.Module()))


def attributes(model: nn.Module, names: Iterable[str] | None = None) -> Attributes:
    """Return copies of plain attributes, without those that a model hasn't.

    Args:
        model: The model.
        names: Which; None: all of the project's own.
    """
    if names is None:
        names = [
            f"{prefix}:{name}"
            for prefix, module in model.named_modules()
            for name in vars(module)
            if name not in _OF_TORCH
        ]
    found: Attributes = {}
    for name in names:
        prefix, _, attribute = name.partition(":")
        own = vars(model.get_submodule(prefix))
        if attribute in own and _is_plain_state(own[attribute]):
            found[name] = _copy(own[attribute])
    return found


def changed(before: Attributes, after: Attributes) -> list[str]:
    """Return the names of attributes that differ, or that only one of the two has."""
    both = before.keys() & after.keys()
    differ = {name for name in both if not _equal_states(before[name], after[name])}
    return sorted(differ | (before.keys() ^ after.keys()))


@contextmanager
def with_attributes(
    model: nn.Module, names: Iterable[str], values: Attributes
) -> Iterator[None]:
    """Have attributes hold copies of other values, and put the model's own back.

    Args:
        model: The model.
        names: Which; those without a value are taken away.
        values: The values.
    """
    held: list[tuple[dict[str, Any], str, list[Any]]] = []
    for name in names:
        prefix, _, attribute = name.partition(":")
        own = vars(model.get_submodule(prefix))
        held.append((own, attribute, [own[attribute]] if attribute in own else []))
        own.pop(attribute, None)
        if name in values:
            own[attribute] = _copy(values[name])
    try:
        yield
    finally:
        for own, attribute, value in held:
            own.pop(attribute, None)
            if value:
                own[attribute] = value[0]


def with_state(
    function: Callable[[nn.Module, Any], Any],
    names: Iterable[str],
    values: Attributes,
) -> Callable[[nn.Module, Any], Any]:
    """Return a function of a model that begins at these attributes' values."""

    def run(model: nn.Module, batch: Any) -> Any:
        with with_attributes(model, names, values):
            return function(model, batch)

    return run


def with_attributes_after(
    function: Callable[[nn.Module, Any], Any],
    names: Iterable[str],
    values: Attributes,
    which: Iterable[str] | None = None,
) -> Callable[[nn.Module, Any], tuple[Any, Attributes]]:
    """Return a function that begins at attributes' values, and gives those it leaves.

    Args:
        function: The function of a model and a batch.
        names: Attributes that it begins with.
        values: Their values.
        which: Attributes that are given; None: all.
    """

    def run(model: nn.Module, batch: Any) -> tuple[Any, Attributes]:
        with with_attributes(model, names, values):
            result = function(model, batch)
            return result, attributes(model, which)

    return run


def _is_plain_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if type(value) in (list, tuple):
        return all(map(_is_plain_state, value))
    if type(value) is dict:
        return all(map(_is_plain_state, value)) and all(
            map(_is_plain_state, value.values())
        )
    return isinstance(value, _PLAIN_TYPES)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value))
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    return value


def _equal_states(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal_states, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            _equal_states(one[key], other[key]) for key in one
        )
    return bool(one == other) or (one != one and other != other)

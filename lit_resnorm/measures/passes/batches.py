"""Batches: which of their dimensions count examples, and what a network takes of them.

A batch is a tensor, or any nest of what Lightning moves to a device: tuples, named
tuples, lists, mappings (`UserDict` and what else is none of the builtin ones),
dataclasses, and types that torch's pytree knows. Every tensor with a dimension counts
the same examples, in its first one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

LABELS = ("labels", "label", "targets", "target", "y")
"""Names under which a batch holds the labels."""

Forward = Callable[[nn.Module, Any], Any]
"""How a model is applied to a batch: `(model, x) -> output`."""


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """Return the batch with a function's value in the place of each leaf."""

    def visit(leaf: Any) -> Any:
        children = _children(leaf)
        if children is None:
            return function(leaf)
        return _rebuilt(leaf, [mapped(function, child) for child in children])

    return pytree.tree_map(visit, batch, is_leaf=_is_packed)


def leaves(batch: Any) -> list[Any]:
    """Return the leaves of a batch, in the order in which `mapped` visits them."""
    found: list[Any] = []
    mapped(found.append, batch)
    return found


def _is_packed(value: Any) -> bool:
    # a named tuple, and yet its parts mean nothing alone
    return isinstance(value, PackedSequence)


def _children(value: Any) -> list[Any] | None:
    """Return the parts of a container; None where it is a leaf."""
    names = None if isinstance(value, tuple) else _named_parts(value)
    if names is not None:
        return [*names.values()]
    is_nest = isinstance(value, (tuple, list)) and not _is_packed(value)
    return [*value] if is_nest else None


def _rebuilt(value: Any, children: Sequence[Any]) -> Any:
    """Return a container of the same kind with other parts."""
    kind: Any = type(value)
    if isinstance(value, Mapping):
        parts = dict(zip(value, children, strict=True))
        if not isinstance(value, MutableMapping):
            return kind(parts)
        # a copy keeps what its constructor was told, as a default
        made = copy.copy(value)
        for key, part in parts.items():
            made[key] = part
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field, child in zip(dataclasses.fields(value), children, strict=True):
            object.__setattr__(made, field.name, child)  # frozen ones too
        return made
    return kind(*children) if hasattr(value, "_fields") else kind(children)


def num_rows(batch: Any) -> int:
    """Return the number of examples in a batch: the leading size of its tensors.

    Raises:
        ValueError: If no tensor has a first dimension, or leading sizes disagree.
    """
    sizes: dict[int, Tensor] = {}
    for leaf in leaves(batch):
        if _is_packed(leaf):
            raise ValueError(
                "the batch holds a PackedSequence, whose rows are no examples: give"
                " batch, of padded sequences, and forward_fn, which packs them"
            )
        if isinstance(leaf, Tensor) and leaf.ndim:
            sizes.setdefault(leaf.shape[0], leaf)
    if len(sizes) == 1:
        return next(iter(sizes))
    if not sizes:
        raise ValueError(
            f"the batch, {_batch_in_words(batch)}, holds no tensor of examples: give"
            " batch, a nest of tensors whose first dimensions count examples, and"
            " forward_fn, which reads it"
        )
    found = " and ".join(str(tuple(leaf.shape)) for leaf in sizes.values())
    raise ValueError(
        f"the tensors of the batch, {_batch_in_words(batch)}, disagree on the number of"
        f" examples: there are shapes {found}. Give batch_dim where another dimension"
        " counts them; else batch (or dataloader), of tensors whose first dimensions"
        " do, and forward_fn, which reads it"
    )


def _batch_in_words(batch: Any) -> str:
    """Return what a batch is, for messages."""
    kind = f"a {type(batch).__name__}"
    parts = [batch, *(_children(batch) or ())]
    if any(
        isinstance(part, (tuple, list))
        and len(part)
        and all(isinstance(each, Mapping) for each in part)
        for part in parts
    ):
        return f"{kind} with a dict an example"
    return kind


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """Return the batch with every tensor that counts examples cut to `rows`."""
    num_rows(batch)

    def cut(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    return mapped(cut, batch)


def occupied(batch: Any) -> tuple[Any, bool]:
    """Return a batch that has a row, and whether that row is a dummy.

    A rank that holds no example still runs every pass, so that it makes the same
    collectives as the others. It runs them on one row of zeros whose values count for
    nothing: pass the second value as `empty` to the runner of
    :func:`~lit_resnorm.measures.passes.untouched.untouched`, and leave the dummy row
    out of every sum.
    """
    if num_rows(batch):
        return batch, False

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.new_zeros((1, *leaf.shape[1:]))
        return leaf

    return mapped(fill, batch), True


def joined(batches: Sequence[Any]) -> Any:
    """Return one batch of the rows of several.

    Single numbers, and whatever is no tensor, are the first batch's; lists without a
    tensor, as of file names, are strung together.

    Raises:
        ValueError: If rows of two batches have different shapes.
    """
    if len(batches) == 1:
        return batches[0]
    for batch in batches:
        num_rows(batch)

    def join(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return _stacked(parts) if first.ndim else first
        children = _children(first)
        if children is None:
            return first
        if isinstance(first, (tuple, list)) and not _has_tensor(first):
            return [*chain.from_iterable(parts)]
        if isinstance(first, Mapping):
            columns: Any = ([part[key] for part in parts] for key in first)
        else:
            columns = zip(*(_children(part) or () for part in parts), strict=True)
        return _rebuilt(first, [join(column) for column in columns])

    return join(batches)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(part.shape[1:]) for part in parts]
    if wrong := [shape for shape in shapes if shape != shapes[0]]:
        raise ValueError(
            f"examples have shape {shapes[0]} in one batch and {wrong[0]} in another:"
            " give num_examples, so few that one batch holds them, or batch"
        )
    return torch.cat([*parts])


def _has_tensor(batch: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(batch))


def _named_parts(batch: Any) -> dict[str, Any] | None:
    """Return the parts of a batch by name; None where they have none."""
    if isinstance(batch, Mapping):
        return {**batch}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = dataclasses.fields(batch)
        return {field.name: getattr(batch, field.name) for field in fields}
    fields = getattr(batch, "_fields", None)
    if isinstance(batch, tuple) and fields is not None:
        return dict(zip(fields, batch, strict=True))
    return None


def target_of(batch: Any) -> Any:
    """Return a batch's target: the part of a usual name, or a tuple's second."""
    names = _named_parts(batch) or {}
    for name in LABELS:
        if name in names:
            return names[name]
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def targets_of(batch: Any) -> Tensor | None:
    """Return a batch's target where that is a tensor."""
    found = target_of(batch)
    return found if isinstance(found, Tensor) else None


def network_output(module: nn.Module, batch: Any) -> Any:
    """Return the module's output on a batch, however the batch is laid out.

    A module's own `probe_forward(batch)` comes first. Else a mapping or a dataclass
    gives the arguments that `forward` names, and so does a named tuple that has them; a
    tuple or list gives its first element, a tensor itself.

    Raises:
        ValueError: If a mapping or dataclass lacks an argument that `forward` requires.
    """
    own = getattr(module, "probe_forward", None)
    if own is not None:
        return own(batch)
    names = _named_parts(batch)
    if names is not None:
        arguments = _named_arguments(module, names, optional=isinstance(batch, tuple))
        if arguments is not None:
            return module(**arguments)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _named_arguments(
    module: nn.Module, names: dict[str, Any], *, optional: bool
) -> dict[str, Any] | None:
    """Return the arguments that forward names; None where a named tuple has none."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None if optional else names
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    missing = [name for name in required if name not in names]
    if optional and (missing or not required):
        return None
    if missing:
        raise ValueError(
            f"{type(module).__name__}.forward needs {', '.join(missing)}, and the probe"
            f" batch has only {', '.join(map(str, names))}: give forward_fn or"
            " probe_forward"
        )
    return {p.name: names[p.name] for p in parameters if p.name in names}

"""State of objects that a forward pass can change, put back to the bit.

A pass runs on copies of the plain tensors that modules hold (buffers, statistics kept
as attributes, hidden states), so what it writes into them never reaches the run's own,
nor a graph that has saved them. Whatever else hangs on a module is put back
afterwards: attributes, containers and their contents, counters, random generators,
NumPy arrays, objects of the project's own classes, and what its functions and forward
hooks remember. Parameters are not copied here; see
:mod:`~lit_resnorm.measures.passes.parameter_writes`.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_resnorm.measures.passes.held_generators import (
    generator_access,
    position_of,
    seed_generator,
)
from lit_resnorm.measures.passes.silenced_logging import logging_silenced
from lit_resnorm.measures.passes.stateful_types import (
    ATOMS,
    KEPT_OF_CLASSES,
    is_machinery,
    is_projects,
    slots_of,
)

_OWN_DICTS = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))
)
"""Slots and hooks of every module, which are kept apart."""

_FORWARD_HOOKS = tuple(name for name in sorted(_OWN_DICTS) if "_forward_" in name)
"""Hooks of forward passes. Those on gradients are off in them."""

_MOST_ITEMS = 100_000
"""Containers of more elements are data: their elements are not looked into."""

_MISSING = object()


class State:
    """The state of some objects, as they hold it when this is made.

    Args:
        roots: Modules or other objects.
        copied: Have the roots hold copies of their tensors until `put_back`. False for
            data, whose tensors may be large and are only read.

    Attributes:
        generators: The random generators that the roots hold.
        changed: Names of what was put back; known after `put_back`.
        lost: Names of what has moved on and can't be put back, likewise.
    """

    def __init__(self, *roots: Any, copied: bool = True) -> None:
        self.generators: list[Any] = []
        self.changed: list[str] = []
        self.lost: list[str] = []
        self._copied = copied
        self._roots = {id(root) for root in roots}
        # What each dict held, and what it holds while the copies stand in.
        self._dicts: list[tuple[str, dict[Any, Any], dict[Any, Any], dict[Any, Any]]]
        self._dicts = []
        self._empty: list[tuple[str, dict[Any, Any] | set[Any]]] = []
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[tuple[str, Tensor, int]] = []
        self._storages: set[int] | None = None
        self._parameters = [
            p
            for root in roots
            if isinstance(root, nn.Module)
            for p in root.parameters()
        ]
        self._waiting: list[tuple[str, Any]] = []
        for root in roots:
            self._replacement("", root)
        while self._waiting:
            self._keep(*self._waiting.pop())

    def put_back(self) -> None:
        """Give every object the state that it had."""
        self.changed += [
            name for name, copy, version in self._tensors if copy._version != version
        ]
        for name, store in self._empty:
            if store:
                self.changed.append(name)
                store.clear()
        for name, store, own, entered in self._dicts:
            if not _same_objects(store, entered):
                self.changed += _names_apart(name, store, entered)
            if entered is not own or not _same_objects(store, own):
                store.clear()
                store.update(own)
        for undo in self._undo:
            undo()
        # They refer to this state: without them it is freed at once, and its copies.
        self._undo.clear()

    def _replacement(self, name: str, value: Any) -> Any:
        """Return what stands in for a value; see that its contents are kept."""
        kind = type(value)
        if kind in ATOMS or (kind is tuple and ATOMS.issuperset(map(type, value))):
            return value
        if (known := self._seen.get(id(value))) is not None:
            return known[1]
        other = value
        if isinstance(value, Tensor):
            other = self._tensor(name, value)
        elif isinstance(value, tuple):
            other = self._tuple(name, value)
        else:
            self._waiting.append((name, value))
        # Along with the value itself, so that its id stays its own.
        self._seen[id(value)] = value, other
        return other

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        shared = isinstance(tensor, nn.Parameter) or is_lazy(tensor)
        if shared or not self._copied or self._views_parameter(tensor):
            return tensor
        copy = tensor.clone()
        if copy.is_inference():  # writes into which leave no trace
            with torch.inference_mode(False):
                copy = copy.clone()
        self._tensors.append((name, copy, copy._version))
        return copy

    def _views_parameter(self, tensor: Tensor) -> bool:
        if tensor.layout is not torch.strided:
            return False
        if self._storages is None:
            self._storages = {
                p.untyped_storage().data_ptr()
                for p in self._parameters
                if p.layout is torch.strided and not is_lazy(p)
            } - {0}
        return tensor.untyped_storage().data_ptr() in self._storages

    def _tuple(self, name: str, value: tuple[Any, ...]) -> tuple[Any, ...]:
        inner = [self._replacement(name, each) for each in value]
        if all(new is old for new, old in zip(inner, value, strict=True)):
            return value
        named = hasattr(value, "_fields")
        return type(value)(*inner) if named else type(value)(inner)

    def _keep(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, dict):
            self._dict(name, value)
        elif isinstance(value, (list, deque)):
            self._list(name, value)
        elif isinstance(value, set):
            self._contents(name, value, set(value), set.clear, set.update)
        elif isinstance(value, bytearray):
            self._contents(name, value, bytes(value), bytearray.clear, bytearray.extend)
        elif isinstance(value, np.ndarray):
            self._array(name, value)
        elif (access := generator_access(value)) is not None:
            self._generator(name, value, *access)
        elif isinstance(value, Iterator):
            self._iterator(name, value)
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
        elif isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
            if not isinstance(value.__self__, Tensor):
                self._replacement(name, value.__self__)
            if isinstance(value, types.MethodType):
                self._replacement(name, value.__func__)
        elif isinstance(value, partial):
            self._partial(name, value)
        elif id(value) in self._roots or is_projects(type(value), self._copied):
            self._object(name, value)

    def _module(self, name: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._scripted(name, module)
            return
        attributes = vars(module)
        self._dict(name, attributes, skipped=_OWN_DICTS)
        # These have no name of their own in a path.
        self._dict(name, module._buffers)
        self._dict(name, module._modules)
        self._dict(name, module._parameters, look_into=False)
        for hooks in _FORWARD_HOOKS:
            self._dict(f"{name}.{hooks}".strip("."), getattr(module, hooks))
        kind = type(module)
        if id(kind) not in self._seen:
            self._seen[id(kind)] = kind, kind
            for base in kind.__mro__:
                if not is_machinery(base.__module__):
                    self._class(base)

    def _scripted(self, name: str, module: torch.jit.ScriptModule) -> None:
        modes = [(each, each.training) for each in module.modules()]
        buffers = [(b, b.detach().clone(), b._version) for b in module.buffers()]

        def undo() -> None:
            for each, mode in modes:
                each.training = mode
            for buffer, own, version in buffers:
                if buffer._version != version:
                    self.changed.append(name)
                    with torch.no_grad():
                        buffer.copy_(own)

        self._undo.append(undo)

    def _object(self, name: str, value: Any) -> None:
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            self._dict(name, attributes)
        slots = {
            slot: getattr(value, slot)
            for kind in type(value).__mro__
            for slot in slots_of(kind)
            if hasattr(value, slot)
        }
        if slots:
            entered = {
                slot: self._replacement(f"{name}.{slot}".strip("."), own)
                for slot, own in slots.items()
            }
            self._attributes(name, value, slots, entered, object.__setattr__)

    def _class(self, kind: type) -> None:
        own = {
            attribute: value
            for attribute, value in vars(kind).items()
            if isinstance(value, KEPT_OF_CLASSES) and not attribute.startswith("__")
        }
        for attribute, value in own.items():
            if not isinstance(value, Tensor):
                self._replacement(f"{kind.__name__}.{attribute}", value)
        self._attributes(kind.__name__, kind, own, own, setattr)
        for attribute, value in vars(kind).items():
            if isinstance(value, (types.FunctionType, staticmethod, classmethod)):
                function = getattr(value, "__func__", value)
                self._replacement(f"{kind.__name__}.{attribute}", function)

    def _function(self, name: str, function: types.FunctionType) -> None:
        """Keep what a function refers to: its variables of outer functions, defaults.

        It may be a hook, an attribute, a method or its decorator.
        """
        if is_machinery(function.__globals__.get("__name__", "")):
            # as what torch.no_grad makes of a function
            self._replacement(name, getattr(function, "__wrapped__", None))
            return
        names = function.__code__.co_freevars
        for variable, cell in zip(names, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:  # several functions may share one
                self._seen[id(cell)] = cell, cell
                self._cell(f"{name}.{variable}", cell)
        own = {"__defaults__": function.__defaults__}
        entered = {n: self._replacement(name, value) for n, value in own.items()}
        self._attributes(name, function, own, entered, setattr)
        for store in (function.__kwdefaults__, vars(function)):
            if store is not None:
                self._dict(name, store)

    def _cell(self, name: str, cell: types.CellType) -> None:
        own = _contents_of(cell)
        entered = own if own is _MISSING else self._replacement(name, own)
        if entered is not own:
            cell.cell_contents = entered

        def undo() -> None:
            if _contents_of(cell) is not entered:
                self.changed.append(name)
            if own is _MISSING:
                del cell.cell_contents
            else:
                cell.cell_contents = own

        self._undo.append(undo)

    def _partial(self, name: str, call: partial[Any]) -> None:
        self._replacement(name, call.func)
        self._dict(name, call.keywords)
        self._dict(name, vars(call))
        own = call.args
        entered = self._replacement(name, own)

        def put(args: tuple[Any, ...]) -> None:
            pickled: Any = call
            pickled.__setstate__((call.func, args, call.keywords, vars(call)))

        if entered is not own:
            put(entered)
            self._undo.append(lambda: put(own))

    def _attributes(
        self,
        name: str,
        owner: Any,
        own: dict[str, Any],
        entered: dict[str, Any],
        assign: Callable[[Any, str, Any], None],
    ) -> None:
        for attribute, value in entered.items():
            if value is not own[attribute]:
                assign(owner, attribute, value)

        def undo() -> None:
            for attribute, value in own.items():
                found = getattr(owner, attribute, _MISSING)
                if found is not entered[attribute]:
                    self.changed.append(f"{name}.{attribute}".strip("."))
                if found is not value:
                    assign(owner, attribute, value)

        self._undo.append(undo)

    def _dict(
        self,
        name: str,
        store: dict[Any, Any],
        *,
        skipped: frozenset[str] = frozenset(),
        look_into: bool = True,
    ) -> None:
        if not store:
            self._empty.append((name, store))
            return
        own = entered = dict(store)
        if look_into and len(own) <= _MOST_ITEMS:
            prefix = f"{name}." if name else ""
            for key, value in own.items():
                if type(value) in ATOMS or key in skipped:
                    continue
                other = self._replacement(f"{prefix}{key}", value)
                if other is not value:
                    if entered is own:
                        entered = dict(own)
                    store[key] = entered[key] = other
        self._dicts.append((name, store, own, entered))

    def _list(self, name: str, values: list[Any] | deque[Any]) -> None:
        own = [*values]
        if len(own) <= _MOST_ITEMS:
            for place, value in enumerate(own):
                other = self._replacement(f"{name}.{place}", value)
                if other is not value:
                    values[place] = other
        entered = [*values]

        def undo() -> None:
            if _differs(values, entered):
                self.changed.append(name)
            if _differs(values, own):
                kind = list if isinstance(values, list) else deque
                kind.clear(values)  # type: ignore[arg-type]
                kind.extend(values, own)  # type: ignore[arg-type]

        self._undo.append(undo)

    def _contents(
        self, name: str, values: Any, own: Any, clear: Any, fill: Any
    ) -> None:
        def undo() -> None:
            if values != own:
                self.changed.append(name)
                clear(values)
                fill(values, own)

        self._undo.append(undo)

    def _array(self, name: str, array: np.ndarray) -> None:
        if not self._copied or not array.flags.writeable:
            return
        own = array.copy()

        def undo() -> None:
            if array.tobytes() != own.tobytes():
                self.changed.append(name)
                array[...] = own

        self._undo.append(undo)

    def _generator(
        self,
        name: str,
        generator: Any,
        get: Callable[[Any], Any],
        put: Callable[[Any, Any], None],
        differ: Callable[[Any, Any], bool],
    ) -> None:
        own = get(generator)
        self.generators.append(generator)

        def undo() -> None:
            if differ(get(generator), own):
                self.changed.append(name)
                put(generator, own)

        self._undo.append(undo)

    def _iterator(self, name: str, iterator: Iterator[Any]) -> None:
        before = position_of(iterator)

        def undo() -> None:
            if position_of(iterator) != before:
                self.lost.append(f"{name} (a {type(iterator).__name__})")

        self._undo.append(undo)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[State]:
    """Run on copies of a model's state, and put the state back whatever happens.

    Parameters stay what they are, and what is written into them stays written. Inside,
    a LightningModule's `log` and its loggers do nothing.

    Yields:
        The state; its `changed` says afterwards what was put back.

    Raises:
        ValueError: If the pass has moved an iterator on; the message names it.
    """
    state = State(model)
    with logging_silenced(model):
        try:
            yield state
        finally:
            state.put_back()
    if state.lost:
        raise ValueError(
            f"{', '.join(state.lost)} of {type(model).__name__} is moved on by a"
            " forward pass and can't be put back: keep a number or a generator instead"
        )


@contextmanager
def data_kept(*sources: Any) -> Iterator[None]:
    """Read data with seeded generators, and put back what reading them changes.

    Loaders, samplers and datasets may share a generator with those that the run trains
    on, count what was read of them, or keep it. Their tensors and arrays are not
    copied.

    Args:
        sources: Loaders, data modules, datasets: any objects.
    """
    state = State(*sources, copied=False)
    for generator in state.generators:
        seed_generator(generator, 0)
    try:
        yield
    finally:
        state.put_back()


def _differs(values: Sequence[Any], own: list[Any]) -> bool:
    return len(values) != len(own) or any(
        a is not b for a, b in zip(values, own, strict=True)
    )


def _same_objects(store: dict[Any, Any], own: dict[Any, Any]) -> bool:
    return [*store] == [*own] and all(map(is_, store.values(), own.values()))


def _names_apart(
    name: str, store: dict[Any, Any], own: dict[Any, Any]
) -> Iterator[str]:
    for key in {**own, **store}:
        if store.get(key, _MISSING) is not own.get(key, _MISSING):
            yield f"{name}.{key}".strip(".")


def _contents_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that holds nothing yet
        return _MISSING

"""Parameters that a forward pass writes into, put back to the bit.

An embedding with `max_norm` scales the rows that it is asked for, a teacher's weights
may be averaged in `forward`. Parameters are too large to be copied at each measurement,
so each is copied when a function is about to write into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # type: ignore[import]
    is_functorch_wrapped_tensor,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_IN_PLACE_OPERATORS = frozenset(
    [
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
        *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
        *("__ilshift__", "__irshift__"),
    ]
)
_GIVES_MEMORY = frozenset(["numpy", "__array__"])
"""What gives the memory itself away, to be written later."""

_WRITES_NO_NUMBER = frozenset(["requires_grad_", "detach_", "share_memory_"])

_MAX_NORM_PLACE = 3
"""Place of `max_norm` among the arguments of `embedding` and `embedding_bag`."""


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Put back, to the bit, the parameters that are written into inside.

    What was written stays until the end, also where a graph has saved it: take the
    gradients inside. Costs a copy of each parameter that is written into.

    Raises:
        ValueError: If a parameter was written into in a way that can't be followed.
    """
    watch = _Writes(model)
    try:
        with watch:
            yield
    finally:
        lost = watch.put_back()
    if lost:
        raise ValueError(
            f"a forward pass of {type(model).__name__} writes into {', '.join(lost)} by"
            " other ways than torch's functions, which can't be put back"
        )


class _Writes(TorchFunctionMode):
    """Copies a parameter before a function of torch writes into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = [(n, p) for n, p in model.named_parameters() if not is_lazy(p)]
        self._versions = [_version(p) for _, p in self._own]
        self._places: dict[int, list[int]] | None = None
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _may_write(func, args, kwargs):
            self._copy((args[:2], kwargs))
        return func(*args, **kwargs)

    def put_back(self) -> list[str]:
        """Restore what was copied; return the names of what was missed."""
        lost = []
        for place, (name, parameter) in enumerate(self._own):
            if place not in self._copies:
                if _version(parameter) != self._versions[place]:
                    lost.append(name)
                continue
            memory, copy = self._copies[place]
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.data = memory
                # Through `data`, which leaves the version to those who count writes.
                memory.copy_(copy)
        return lost

    def _copy(self, arguments: Any) -> None:
        if self._places is None:
            self._places = {}
            for place, (_, parameter) in enumerate(self._own):
                if (key := _memory(parameter)) is not None:
                    self._places.setdefault(key, []).append(place)
        for leaf in pytree.tree_leaves(arguments):
            if not isinstance(leaf, Tensor) or (key := _memory(leaf)) is None:
                continue
            for place in self._places.get(key, ()):
                if place not in self._copies:
                    memory = self._own[place][1].data
                    self._copies[place] = memory, memory.clone()


def _may_write(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    if (schema := getattr(func, "_schema", None)) is not None:
        return schema.is_mutable  # one of torch.ops
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return name not in _WRITES_NO_NUMBER
    if name in ("embedding", "embedding_bag"):
        limit = args[_MAX_NORM_PLACE] if len(args) > _MAX_NORM_PLACE else None
        return (limit if limit is not None else kwargs.get("max_norm")) is not None
    if name == "__get__" or name == "__set__":
        return getattr(func, "__self__", None) is Tensor.data
    return name in _IN_PLACE_OPERATORS or name in _GIVES_MEMORY or "out" in kwargs


def _memory(tensor: Tensor) -> int | None:
    """Return where a tensor's numbers lie; None for those without memory of their own.

    Tensors of `torch.func` wrap others, and have none.
    """
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def _version(tensor: Tensor) -> int | None:
    # Inference tensors (made under Lightning's evaluation loop) keep no counter.
    return None if tensor.is_inference() else tensor._version

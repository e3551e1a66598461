"""A walk through a forward pass: every module and function that may be a site.

Places are numbered in the order of entry, the same in every pass of a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Elementwise activations by the names of their functions, in-place forms and
# underscores aside; torch's modules have the same names.
ACTIVATION_NAMES = frozenset(
    [
        "relu",
        "relu6",
        "leakyrelu",
        "prelu",
        "rrelu",
        "gelu",
        "silu",
        "elu",
        "selu",
        "celu",
        "mish",
        "hardswish",
        "softplus",
        "tanh",
        "sigmoid",
        "hardtanh",
        "hardsigmoid",
        "logsigmoid",
        "softsign",
        "tanhshrink",
    ]
)
_ADDITIONS = frozenset(["add", "add_"])


def refuse_torchscript(model: nn.Module) -> None:
    """Refuse modules whose operations and submodules can't be followed.

    Raises:
        ValueError: If there is one; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"module {name or type(module).__name__!r} is TorchScript's, whose"
                " operations can't be followed; give the model that it was made of"
            )


class Walk(TorchFunctionMode, ABC):
    """Numbers the candidate places of a forward pass in the order of entry."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        refuse_torchscript(model)
        self.entry = -1
        self.frames: list[tuple[int, nn.Module, str]] = []
        self._modules = dict(model.named_modules())
        # By identity: the hash of a metric of torchmetrics is that of its state.
        self._names = {
            id(module): name.replace("_orig_mod.", "")
            .removesuffix("_orig_mod")
            .strip(".")
            for name, module in self._modules.items()
        }
        self._handles: list[Any] = []

    def __enter__(self) -> Walk:
        for module in self._modules.values():
            if _is_metric(module):
                continue
            self._handles += [
                module.register_forward_pre_hook(self._enter_module, with_kwargs=True),
                module.register_forward_hook(self._leave_module, with_kwargs=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entry += 1
        self.frames.append((self.entry, module, self._names[id(module)]))
        self.entered(self.entry, args, kwargs)

    def _leave_module(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        entry, entered, _ = self.frames.pop()
        if entered is not module:
            name = self._names[id(module)]
            raise RuntimeError(f"{name} ended while another module ran")
        return self.left(entry, module, args, kwargs, output)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        op = name.removesuffix("_").replace("_", "")
        if op in ACTIVATION_NAMES or (name in _ADDITIONS and _adds_tensors(args)):
            self.entry += 1
            return self.applied(self.entry, op, func, args, kwargs)
        return self.passed(name, func, args, kwargs)

    @abstractmethod
    def entered(self, entry: int, args: Any, kwargs: Any) -> None:
        """A module begins."""

    @abstractmethod
    def left(
        self, entry: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        """A module ends; what is returned, unless None, replaces its output."""

    @abstractmethod
    def applied(
        self, entry: int, op: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Apply a function that may be a site."""

    def passed(
        self, _name: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Apply any other torch function."""
        return func(*args, **kwargs)


def _is_metric(module: nn.Module) -> bool:
    """Return whether a module counts what passes by, and is no part of the network."""
    kinds = type(module).__mro__
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in kinds)


def _adds_tensors(args: tuple[Any, ...]) -> bool:
    # Of any shapes: one that is broadcast over the examples has that of a single one.
    return (
        len(args) > 1
        and isinstance(args[0], Tensor)
        and isinstance(args[1], Tensor)
        and args[0].is_floating_point()
    )

"""Hooks on gradients, which are the run's own and no part of the network's function."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks on gradients of parameters and modules off, and put them back.

    They change gradients (clamps, masks, noise), so that what is differentiated would
    not be the network, and they count and log (`wandb.watch`). Handles that remove
    them stay valid.
    """
    held: list[tuple[Any, str, Any]] = [
        (parameter, "_backward_hooks", parameter._backward_hooks)
        for parameter in model.parameters()
        if parameter._backward_hooks
    ]
    held += [
        (module, name, hooks)
        for module in model.modules()
        for name in _OF_MODULES
        if (hooks := getattr(module, name))
    ]
    try:
        for owner, name, _ in held:
            is_module = isinstance(owner, nn.Module)
            setattr(owner, name, OrderedDict() if is_module else None)
        yield
    finally:
        for owner, name, hooks in held:
            setattr(owner, name, hooks)

"""A model's functions at other weights, with the model's own put back.

`torch.func.functional_call` leaves its substitutes behind where one layer stands under
two names, and swaps by name, so that a weight under a second name can be missed. Here
tensors are swapped by identity, and every slot gets back the object that it held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Slots = dict[str, Tensor | None]
"""Parameters or buffers of one module, as the module itself holds them."""


@contextmanager
def slots_kept(model: nn.Module) -> Iterator[list[Slots]]:
    """Put every module's parameters and buffers back: the same objects, in order.

    What was assigned, added or deleted inside is undone, also after an exception; what
    was written into a tensor is not.

    Yields:
        The slots of all modules, which the caller may fill otherwise.
    """
    slots: list[Any] = [s for m in model.modules() for s in (m._parameters, m._buffers)]
    held = [dict(each) for each in slots]
    try:
        yield slots
    finally:
        for each, own in zip(slots, held, strict=True):
            if [*each] != [*own] or any(each[name] is not own[name] for name in own):
                each.clear()
                each.update(own)


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have other parameters and buffers in a model's own place.

    A tensor is replaced wherever it stands, whichever of its names is given. Works
    under `torch.func.vmap` and with dual tensors; buffers that a forward pass updates
    in place are updated in `weights`.

    Args:
        model: The model, whose slots are put back afterwards, whatever happens.
        weights: Parameters and buffers by the model's names; those that aren't named
            stay the model's own.

    Raises:
        ValueError: If the model has no tensor of a name, or one tensor is given two
            values.
    """
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    others: dict[int, Tensor] = {}
    for name, value in weights.items():
        if name not in named:
            raise ValueError(
                f"{type(model).__name__} has no parameter or buffer {name!r}"
            )
        if others.setdefault(id(named[name]), value) is not value:
            raise ValueError(
                f"{name!r} of {type(model).__name__} has another name, under which it"
                " is given another value"
            )
    with slots_kept(model) as slots:
        for each in slots:
            for name, own in each.items():
                if own is not None and id(own) in others:
                    each[name] = others[id(own)]
        yield

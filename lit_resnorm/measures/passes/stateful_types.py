"""Which types hold state of a network that a forward pass may change."""

from __future__ import annotations

import sys
import types
from collections import deque
from functools import cache

import numpy as np
import torch
from torch import Tensor

ATOMS = frozenset(
    [
        *(int, float, bool, complex, str, bytes, type, range, slice, type(None)),
        *(torch.dtype, torch.device, torch.Size, torch.layout),
        types.ModuleType,
    ]
)
"""Types whose values no pass can change."""

_TRAINERS = frozenset(
    [
        *(
            "lightning",
            "pytorch_lightning",
            "lightning_fabric",
            "lit_resnorm_callbacks",
        ),
        *("tensorboard", "tensorboardX"),
    ]
)
"""Packages whose objects run networks, or report on them: they lead to everything,
probes and other threads' queues included."""

_MACHINERY = _TRAINERS | {"torch", "lit_resnorm"}
"""Packages whose objects, unless they are modules, hold no state of a network."""

KEPT_OF_CLASSES = (int, float, str, list, dict, set, deque, Tensor, np.ndarray)


def slots_of(kind: type) -> tuple[str, ...]:
    """Return the names of a class's slots that hold values."""
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


@cache
def is_machinery(module: str) -> bool:
    """Return whether what a module defines holds no state of a network."""
    top = module.partition(".")[0]
    return top in _MACHINERY or top in sys.stdlib_module_names


@cache
def is_projects(kind: type, of_model: bool) -> bool:
    """Return whether objects of a class may hold state that a pass changes."""
    top = kind.__module__.partition(".")[0]
    if top in sys.stdlib_module_names:
        return top in ("collections", "types")
    tops = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return not tops & (_MACHINERY if of_model else _TRAINERS)

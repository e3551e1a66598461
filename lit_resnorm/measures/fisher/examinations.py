"""What examinations of a network found, for measuring it again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn

from lit_resnorm.measures.fisher.shards import Shards

_KEPT = 8
"""Structures that are kept: a pass may take one of several ways."""

_SETTINGS = (bool, int, float, str)


@dataclass(frozen=True)
class Examined:
    """What gradients say of the recorded uses.

    Attributes:
        otherwise: Parameters whose gradient is not that of their uses.
        separable: Whether rows that run together can be told apart in every use.
        coupled: Whether a row's output or gradient depends on the other rows.
        lasting: Whether every parameter had a finite gradient other than 0: a factor
            of 0 hides what is behind it, and NaN is apart from nothing.
    """

    otherwise: frozenset[str]
    separable: bool
    coupled: bool
    lasting: bool


class Examinations:
    """What examinations found, by the structure of the network that they saw.

    For one model that is applied in one way, whose weights change: an examination costs
    half of the exact trace of a small network. What does not last is not kept.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Examined] = {}

    def result(
        self,
        structure: Hashable,
        examine: Callable[[], Examined],
        shards: Shards,
        device: torch.device,
    ) -> Examined:
        """Return what was found before, on all ranks, or what `examine()` finds.

        Args:
            structure: All that the finding depends on, beside the weights' values.
            examine: Examines; sums over ranks.
            shards: Knows the ranks.
            device: Where sums are made.
        """
        known = self._found.get(structure)
        is_new = torch.tensor(float(known is None), device=device)
        if not shards.alone:
            is_new = shards.reduce(is_new)
        if known is not None and not is_new:
            return known
        found = examine()
        if found.lasting:
            if len(self._found) >= _KEPT:
                self._found.clear()
            self._found[structure] = found
        return found


def settings(model: nn.Module) -> Hashable:
    """Return what of a model besides weights decides which way a pass takes.

    Classes of modules, numbers of hooks, plain settings, and buffers of one number that
    may be a factor. In order of the modules' names.
    """
    return tuple(
        (
            name,
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if type(value) in _SETTINGS and not key.startswith("_")
            ),
            tuple(
                (key, float(buffer))
                for key, buffer in module._buffers.items()
                if buffer is not None
                and buffer.numel() == 1
                and buffer.is_floating_point()
            ),
        )
        for name, module in model.named_modules()
    )

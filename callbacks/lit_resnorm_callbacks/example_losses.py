"""The loss of each example of a batch, for modules that have only their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

LossFn = Callable[[Any, Any], Tensor]
"""Takes output and target and returns the loss of each example."""

_TARGETS = ("target", "targets", "label", "labels", "y")


def losses_of(module: Any, output: Any, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """Return the loss of each example, shape `(B,)`.

    Losses of several positions of an example are averaged.

    Args:
        module: The module; its own `losses(output, target)` comes after `loss_fn`.
        output: The network's output on the batch.
        batch: A pair, of which the second element is the target, or a dict with one of
            `target`, `targets`, `label`, `labels`, `y`.
        loss_fn: Gives the losses; None: the module's own, else cross entropy.

    Raises:
        ValueError: If there is no target, or no cross entropy of it.
    """
    given = loss_fn or getattr(module, "losses", None) or _cross_entropies
    losses = given(output, _target(batch))
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def _target(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        for name in _TARGETS:
            if name in batch:
                return batch[name]
        raise ValueError(
            f"the batch has {', '.join(map(str, batch))}, and its target is none of"
            f" {', '.join(_TARGETS)}"
        )
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ValueError(
        f"a batch that is a {type(batch).__name__} has no target beside its input"
    )


def _cross_entropies(output: Any, target: Any) -> Tensor:
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise ValueError(
            f"there is no cross entropy of a {type(output).__name__} and a"
            f" {type(target).__name__}: give loss_fn"
        )
    return F.cross_entropy(output, target, reduction="none")

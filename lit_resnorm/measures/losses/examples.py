"""The loss of each example of a batch, for modules that have only their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.measures.losses.labels import class_dim_of

LossFn = Callable[[Any, Any], Tensor]
"""Takes output and target and returns the loss of each example."""


def cross_entropies(
    output: Tensor,
    target: Tensor,
    *,
    class_dim: int | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of each example and position.

    Args:
        output: Logits, shape `(B, C)`, `(B, T, C)` or `(B, C, H, W)`.
        target: Classes, or their probabilities.
        class_dim: Dimension that counts classes, where it is another.
        class_weights: Weights of the classes, shape `(C,)`.
        ignore_index: Label of positions without a loss.
        smoothing: Share of each label that is spread over all classes.

    Raises:
        ValueError: If output and target don't fit.
    """
    try:
        dim = class_dim_of(output) if class_dim is None else class_dim
        logits = output.movedim(dim, 1)
        if target.is_floating_point():
            labels = target.movedim(dim, 1)
        else:
            labels = target.reshape(logits.shape[:1] + logits.shape[2:])
        return F.cross_entropy(
            logits,
            labels,
            None if class_weights is None else class_weights.to(logits),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction="none",
        )
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"there is no cross entropy of an output of shape {tuple(output.shape)} and"
            f" a target of shape {tuple(target.shape)} ({target.dtype}): {error}"
        ) from error

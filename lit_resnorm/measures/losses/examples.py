"""The loss of each example of a batch, for modules that have only their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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


def check_mean(name: str, losses_B: Tensor, loss: Tensor) -> None:
    """See that the mean of the examples' losses is the run's loss.

    Args:
        name: The probe's name, for the message.
        losses_B: Losses of the examples of a batch.
        loss: The run's loss of the batch, 0-d.

    Raises:
        ValueError: If it isn't, beyond rounding.
    """
    mean, own = losses_B.double().mean(), loss.detach().double()
    tolerance = torch.finfo(losses_B.dtype).eps ** 0.5
    if not torch.isclose(own, mean, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"{name}: the training loss of the first batch is {own:.8g}, and"
            f" its examples' losses have the mean {mean:.8g}: give loss_fn (per"
            " example, without penalties) or forward_fn such that they agree"
        )


def usual_losses(output: Any, target: Any) -> Tensor:
    """Return cross entropies; binary ones of one logit for each number.

    Args:
        output: Logits.
        target: Classes or probabilities.

    Raises:
        ValueError: If there is no cross entropy of the two.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise ValueError(
            f"there is no cross entropy of a {type(output).__name__} and a"
            f" {type(target).__name__}"
        )
    numbers = target.is_floating_point() and target.numel() == output.numel()
    if numbers and (output.ndim == 1 or output.shape[class_dim_of(output)] == 1):
        shaped = target.reshape(output.shape).to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, shaped, reduction="none")
    return cross_entropies(output, target)

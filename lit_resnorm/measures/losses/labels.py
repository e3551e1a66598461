"""Labels of classes, and whether an output has these classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def class_dim_of(output: Tensor) -> int:
    """Return the dimension of an output that counts its classes."""
    return 1 if output.ndim > 3 else -1


def are_labels(target: Any) -> bool:
    """Say whether a target is a tensor of class indices."""
    return isinstance(target, Tensor) and not target.is_floating_point()


def check_labels(
    distribution: str,
    output: Tensor,
    target: Any,
    *,
    ignore_index: int = -100,
    may_be_negative: bool = False,
) -> None:
    """Refuse labels for which the output has no class.

    Args:
        distribution: Of the output; labels are checked for `softmax` and `bernoulli`.
        output: The network's output on some examples.
        target: Of these or more examples; what is no tensor of labels is left alone.
        ignore_index: Label of positions that are no examples.
        may_be_negative: Whether the loss may know what a negative label is.

    Raises:
        ValueError: If a label is out of range.
    """
    if not are_labels(target) or distribution == "gaussian" or not output.ndim:
        return
    counted = target[target != ignore_index]
    if not counted.numel():
        return
    low, high = int(counted.min()), int(counted.max())
    num = 2 if distribution == "bernoulli" else output.shape[class_dim_of(output)]
    if high < num and (low >= 0 or may_be_negative):
        return
    has = "one logit for 0 and 1" if distribution == "bernoulli" else f"{num} classes"
    raise ValueError(
        f"the labels go from {low} to {high}, and the output has {has}: give a network"
        f" with an output for each class, and labels from 0 to {num - 1}"
    )

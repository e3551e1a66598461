"""Which likelihood a loss means: the options of torch's losses, read and named."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss as TorchLoss

from lit_resnorm.diagnose.labels import check_labels, class_dim
from lit_resnorm.diagnose.meant import Meant
from lit_resnorm.measures.fisher.heads import check_output
from lit_resnorm_callbacks.distributions import (
    Likelihood,
    distribution_of,
    likelihood_of_loss,
    loss_of,
)

_FUNCTIONS: tuple[tuple[Any, type[TorchLoss]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.mse_loss, nn.MSELoss),
)
_KNOWN = tuple(kind for _, kind in _FUNCTIONS)

_NAMES = {
    "softmax": "cross entropy",
    "bernoulli": "binary cross entropy",
    "gaussian": "half the squared distance",
}


def likelihood_meant(
    module: nn.Module,
    output: Tensor,
    target: Any,
    *,
    distribution: str = "auto",
    loss_fn: Any = None,
    loss_scale: float | None = None,
) -> Meant:
    """Return the likelihood that a loss means.

    Args:
        module: The network; its loss is read as `FIMEigenvalueProbe` reads it, and
            `MSELoss` besides.
        output: Its output on the first examples, shape `(B, ...)`.
        target: Of these or more examples.
        distribution: `softmax`, `bernoulli`, `gaussian`, or `auto`.
        loss_fn: A loss that is given; of torch's it is read in place of the module's.
        loss_scale: Stands in place of the scale that is read.

    Raises:
        ValueError: If an option can't be right, the loss tells no likelihood, or the
            output has no class for a label.
    """
    if distribution != "auto":
        check_output(distribution)
    if loss_scale is not None and not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale is {loss_scale}; it must be positive")
    loss = _torch_loss(module, loss_fn)
    told = _told(module, loss, loss_fn, distribution)
    was_read = loss is not None and told.output != "auto"
    was_read &= distribution == "auto" or type(loss) is nn.MSELoss
    guessed = told.output == "auto"
    if guessed:
        told = replace(told, output=_guess(output, target))
    num = 1 if told.output == "softmax" else math.prod(output.shape[1:])
    read = told.factor / num if told.scale is None else told.scale
    scale = read if loss_scale is None else loss_scale
    if loss_fn is None or was_read:
        check_labels(
            told.output,
            output,
            target,
            ignore_index=told.ignore_index,
            may_be_negative=guessed and callable(getattr(module, "losses", None)),
        )
    _check_weights(told, output)
    words = _words(told, scale, num)
    words += f", labels smoothed by {told.smoothing:g}" if told.smoothing else ""
    return Meant(told, scale, words, was_read)


def _torch_loss(module: nn.Module, loss_fn: Any) -> TorchLoss | None:
    """Return the loss of torch's that is given, or else the module's."""
    if loss_fn is not None:
        made = [kind() for function, kind in _FUNCTIONS if loss_fn is function]
        known = type(loss_fn) in _KNOWN
        return loss_fn if known else made[0] if made else None
    own = loss_of(module)
    return own if isinstance(own, TorchLoss) else None


def _told(
    module: nn.Module, loss: TorchLoss | None, loss_fn: Any, distribution: str
) -> Likelihood:
    """Return what a loss tells; `auto` where there is none to ask."""
    if distribution == "auto" and loss is not None:
        return likelihood_of_loss(loss)
    if distribution == "gaussian" and isinstance(loss, nn.MSELoss):
        # of a loss that isn't averaged, the sum over outputs
        scale = None if loss.reduction == "mean" else 2.0
        return Likelihood(distribution, scale, factor=2.0)
    if distribution != "auto":
        return Likelihood(distribution)
    asked = loss_fn is None or hasattr(module, "loss")
    return Likelihood(distribution_of(module) if asked else "auto")


def _guess(output: Tensor, target: Any) -> str:
    """Return the distribution that output and target tell."""
    if isinstance(target, Tensor) and target.is_floating_point():
        alike = target.shape[1:] == output.shape[1:]
        one_each = target.numel() == len(target) and math.prod(output.shape[1:]) == 1
        no_share = bool(((target < 0) | (target > 1)).any())
        if (alike or (one_each and no_share)) and not _is_share(target):
            return "gaussian"
    single = output.ndim == 1 or output.shape[class_dim(output)] == 1
    return "bernoulli" if single else "softmax"


def _is_share(target: Tensor) -> bool:
    """Say whether rows are probabilities of classes."""
    if target.ndim < 2 or target.shape[1] < 2 or bool((target < 0).any()):
        return False
    return bool(torch.allclose(target.sum(1), torch.ones_like(target.sum(1))))


def _check_weights(told: Likelihood, output: Tensor) -> None:
    if told.class_weights is None:
        return
    num, given = output.shape[class_dim(output)], len(told.class_weights)
    if given != num:
        raise ValueError(
            f"the loss has weights of {given} classes, and the output has {num}"
        )


def _words(told: Likelihood, scale: float, num: int) -> str:
    name = _NAMES[told.output]
    if told.class_weights is not None:
        name += ", classes weighted"
    squared = told.output == "gaussian"
    mean = 2 / num if squared else 1 / num
    if math.isclose(scale, mean) and (squared or num > 1):
        name = "squared error" if squared else name
        return name if num == 1 else f"{name}, averaged over {num} outputs"
    if not math.isclose(scale, 1.0):
        return f"{scale:g} times {name}"
    return f"{name}, summed over {num} outputs" if num > 1 and not squared else name

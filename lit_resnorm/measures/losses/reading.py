"""Which likelihood a loss means: torch's losses and ours, read with their options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from lit_resnorm.measures.fisher.head import check_output
from lit_resnorm.measures.losses.labels import check_labels, class_dim_of
from lit_resnorm.measures.losses.likelihood import Likelihood

# Losses by the name that our modules give them, and torch's own.
_OUTPUTS = {"cross_entropy": "softmax", "mse": "gaussian"}
_LOSSES = {
    nn.CrossEntropyLoss: "softmax",
    nn.BCEWithLogitsLoss: "bernoulli",
    nn.MSELoss: "gaussian",
}
_LIKELIHOOD_FUNCTIONS: tuple[tuple[Any, type[_Loss]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.mse_loss, nn.MSELoss),
)


def own_loss(module: nn.Module) -> str | _Loss | None:
    """Return a module's loss, None where there is none to ask.

    It is the module's `loss`: the name that our modules give theirs, or one of torch's;
    else the only one of torch's among its children.
    """
    loss = getattr(module, "loss", None)
    if isinstance(loss, _Loss) or (isinstance(loss, str) and loss in _OUTPUTS):
        return loss
    own = [child for child in module.children() if isinstance(child, _Loss)]
    return own[0] if len(own) == 1 else None


def distribution_of(module: nn.Module) -> str:
    """Return the distribution that belongs to a module's loss, `auto` without one.

    Raises:
        ValueError: If its loss tells none.
    """
    loss = own_loss(module)
    if loss is None:
        return "auto"
    return _OUTPUTS[loss] if isinstance(loss, str) else _distribution(loss)


def likelihood_of(module: nn.Module) -> Likelihood:
    """Return what a module's loss tells; see `likelihood_of_loss`."""
    loss = own_loss(module)
    if isinstance(loss, _Loss):
        return likelihood_of_loss(loss)
    return Likelihood(distribution_of(module))


def likelihood_of_loss(loss: _Loss) -> Likelihood:
    """Return what a loss of torch's tells, its options included.

    Raises:
        ValueError: If it tells no distribution, is summed over a batch, or weighs the
            two outcomes of a logit.
    """
    output = _distribution(loss)
    told = f"output is 'auto' and the module's loss is {type(loss).__name__}"
    factor = 2.0 if isinstance(loss, nn.MSELoss) else 1.0
    if loss.reduction == "sum":
        size = "the size" if factor == 1 else "twice the size"
        raise ValueError(
            f"{told} with reduction='sum', whose curvature grows with the batch; give"
            f" output {output!r} and, for loss_scale, {size} of the training batch"
        )
    if isinstance(loss, nn.CrossEntropyLoss):
        smoothing = loss.label_smoothing
        return Likelihood(
            output, 1.0, loss.weight, loss.ignore_index, smoothing=smoothing
        )
    for option in ("weight", "pos_weight"):
        if getattr(loss, option, None) is not None:
            raise ValueError(
                f"{told} with {option}, which is no likelihood; give output {output!r}"
                " to measure without it"
            )
    scale = None if loss.reduction == "mean" else factor
    return Likelihood(output, scale, factor=factor)


def _distribution(loss: _Loss) -> str:
    if type(loss) not in _LOSSES:
        raise ValueError(
            f"output is 'auto' and the module's loss is {type(loss).__name__}, which"
            " tells no distribution; give output 'softmax', 'bernoulli' or 'gaussian'"
            " (and loss_scale)"
        )
    return _LOSSES[type(loss)]


def meant_likelihood(
    module: nn.Module,
    output: Tensor,
    target: Any,
    *,
    distribution: str = "auto",
    loss_fn: Any = None,
    loss_scale: float | None = None,
) -> tuple[Likelihood, bool]:
    """Return the likelihood that a loss means.

    Args:
        module: The network, whose own loss is read.
        output: Its output on the first examples, shape `(B, ...)`.
        target: Of these or more examples.
        distribution: `softmax`, `bernoulli`, `gaussian`, or `auto`.
        loss_fn: A loss that is given; of torch's it is read in place of the module's.
        loss_scale: Stands in place of the scale that is read.

    Returns:
        The likelihood, and whether it is the whole of a loss of torch's.

    Raises:
        ValueError: If an option can't be right, the loss tells no likelihood, or the
            output has no class for a label.
    """
    if distribution != "auto":
        check_output(distribution)
    if loss_scale is not None and not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale is {loss_scale}; it must be positive")
    loss = _torch_loss(module, loss_fn)
    told = _likelihood_told(module, loss, loss_fn, distribution)
    was_read = loss is not None and told.output != "auto"
    was_read &= distribution == "auto" or type(loss) is nn.MSELoss
    guessed = told.output == "auto"
    if guessed:
        told = replace(told, output=_guess(output, target))
    num = 1 if told.output == "softmax" else math.prod(output.shape[1:])
    scale = told.scale if loss_scale is None else loss_scale
    told = replace(told, scale=scale, num_outputs=num)
    if loss_fn is None or was_read:
        check_labels(
            told.output,
            output,
            target,
            ignore_index=told.ignore_index,
            may_be_negative=guessed and callable(getattr(module, "losses", None)),
        )
    _check_weights(told, output)
    return told, was_read


def _torch_loss(module: nn.Module, loss_fn: Any) -> _Loss | None:
    """Return the loss of torch's that is given, or else the module's."""
    if loss_fn is not None:
        made = [
            kind() for function, kind in _LIKELIHOOD_FUNCTIONS if loss_fn is function
        ]
        known = type(loss_fn) in _LOSSES
        return loss_fn if known else made[0] if made else None
    own = own_loss(module)
    return own if isinstance(own, _Loss) else None


def _likelihood_told(
    module: nn.Module, loss: _Loss | None, loss_fn: Any, distribution: str
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
    single = output.ndim == 1 or output.shape[class_dim_of(output)] == 1
    return "bernoulli" if single else "softmax"


def _is_share(target: Tensor) -> bool:
    """Say whether rows are probabilities of classes."""
    if target.ndim < 2 or target.shape[1] < 2 or bool((target < 0).any()):
        return False
    return bool(torch.allclose(target.sum(1), torch.ones_like(target.sum(1))))


def _check_weights(told: Likelihood, output: Tensor) -> None:
    if told.class_weights is None:
        return
    num, given = output.shape[class_dim_of(output)], len(told.class_weights)
    if given != num:
        raise ValueError(
            f"the loss has weights of {given} classes, and the output has {num}"
        )

"""The loss of a batch, for any network whose output and target tell one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_resnorm.diagnose.labels import check_labels, class_dim
from lit_resnorm.measures.fisher.heads import check_output
from lit_resnorm.measures.observe import take_rows
from lit_resnorm_callbacks.distributions import distribution_of
from lit_resnorm_callbacks.example_losses import cross_entropies
from lit_resnorm_callbacks.probe_batch import target_of

LossFn = Callable[[Any, Any], Tensor]
"""Takes output and target; returns the loss of each example, or their mean."""

_MEANT = {
    "softmax": "cross entropy",
    "bernoulli": "binary cross entropy",
    "gaussian": "half the squared distance",
}


@dataclass(frozen=True)
class Loss:
    """How the outputs of a network are judged.

    Attributes:
        distribution: Distribution of the output that the loss belongs to: `softmax`,
            `bernoulli` or `gaussian`; None where the output tells none.
        function: Takes module, output and target and returns the losses of the
            examples, shape `(B,)`, or their mean; None where there is no loss.
        words: What it is, for the report.
    """

    distribution: str | None
    function: Callable[[nn.Module, Any, Any], Tensor] | None
    words: str

    def of(self, module: nn.Module, output: Any, batch: Any) -> Tensor:
        """Return the losses of the examples, or their mean.

        Raises:
            ValueError: If there is no loss.
        """
        if self.function is None:
            raise ValueError(f"there is no loss: {self.words}")
        return self.function(module, output, target_of(batch))


def loss_of(
    module: nn.Module,
    output: Any,
    batch: Any,
    *,
    distribution: str = "auto",
    loss_fn: LossFn | None = None,
) -> Loss:
    """Return the loss that the module, its output and the target tell.

    In this order: `loss_fn`, the module's own `losses(output, target)`, what
    `distribution` says, cross entropy of logits and classes, half the squared distance
    to a target of the output's shape.

    Args:
        module: The network.
        output: Its output on the first examples of the batch.
        batch: The batch.
        distribution: `softmax`, `bernoulli`, `gaussian`, or `auto`.
        loss_fn: Takes output and target.

    Raises:
        ValueError: If `distribution` is none of these, or the module has a loss that
            tells none and none is given; if the output has no class for a label.
    """
    if distribution != "auto":
        check_output(distribution)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = type(output).__name__
        words = f"the output is a {found}, no tensor of logits or predictions"
        return Loss(None, _given(loss_fn), words)
    if not output.ndim:
        raise ValueError(
            f"the output of {type(module).__name__} is a single number; diagnose needs"
            " outputs of examples: give forward, a function of module and batch"
        )
    target = target_of(take_rows(batch, slice(len(output))))
    if distribution == "auto" and (loss_fn is None or hasattr(module, "loss")):
        distribution = distribution_of(module)
    if distribution == "auto":
        distribution = _guess(output, target)
    words = _MEANT[distribution]
    if loss_fn is not None:
        return Loss(distribution, _given(loss_fn), "the given loss_fn")
    own = getattr(module, "losses", None)
    check_labels(distribution, output, target_of(batch), may_be_negative=callable(own))
    if callable(own) and target is not None:
        return Loss(distribution, _own_losses, f"the module's own, {words}")
    if not isinstance(target, Tensor) or not _fits(distribution, output, target):
        shape = tuple(target.shape) if isinstance(target, Tensor) else None
        about = "no target" if shape is None else f"a target of shape {shape}"
        return Loss(
            distribution,
            None,
            f"{words} of an output of shape {tuple(output.shape)} and {about}",
        )
    return Loss(distribution, lambda _, out, y: _losses(distribution, out, y), words)


def _given(
    loss_fn: LossFn | None,
) -> Callable[[nn.Module, Any, Any], Tensor] | None:
    if loss_fn is None:
        return None
    return lambda _, output, target: loss_fn(output, target)


def _own_losses(module: nn.Module, output: Any, target: Any) -> Tensor:
    losses: LossFn = module.losses  # type: ignore[assignment]
    return losses(output, target)


def _guess(output: Tensor, target: Any) -> str:
    numbers = isinstance(target, Tensor) and target.is_floating_point()
    if numbers and target.shape == output.shape and not _is_share(target):
        return "gaussian"
    wide = 1 if output.ndim > 3 else -1
    return "bernoulli" if output.shape[wide] == 1 else "softmax"


def _is_share(target: Tensor) -> bool:
    """Say whether rows are probabilities of classes."""
    if target.ndim < 2 or target.shape[1] < 2 or bool((target < 0).any()):
        return False
    return bool(torch.allclose(target.sum(1), torch.ones_like(target.sum(1))))


def _fits(distribution: str, output: Tensor, target: Tensor) -> bool:
    if distribution == "softmax" and not target.is_floating_point():
        return target.numel() * output.shape[class_dim(output)] == output.numel()
    if distribution == "softmax":
        return target.shape == output.shape
    return target.numel() == output.numel()


def _class_dim(output: Tensor) -> int:
    return 1 if output.ndim > 3 else -1


def _losses(distribution: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the losses of the examples, shape `(B,)`; positions are averaged."""
    if distribution == "softmax":
        losses = cross_entropies(output, target)
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    shaped = target.reshape(output.shape).to(output.dtype)
    if distribution == "bernoulli":
        losses = F.binary_cross_entropy_with_logits(output, shaped, reduction="none")
    else:
        losses = (output - shaped).square() / 2
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

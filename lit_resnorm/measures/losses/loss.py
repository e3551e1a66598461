"""The loss of a batch, for any network whose output and target tell one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_resnorm.measures.losses.examples import LossFn
from lit_resnorm.measures.losses.labels import class_dim_of
from lit_resnorm.measures.losses.likelihood import Likelihood
from lit_resnorm.measures.losses.reading import (
    meant_likelihood,
)
from lit_resnorm.measures.passes.batches import take_rows, target_of


@dataclass(frozen=True)
class Loss:
    """How the outputs of a network are judged.

    Attributes:
        likelihood: The one whose curvature is that of the loss; None where the output
            tells none.
        function: Takes module, output and target and returns the losses of the
            examples, shape `(B,)`, or their mean; None where there is no loss.
        words: What it is, for the report.
    """

    likelihood: Likelihood | None
    function: Callable[[nn.Module, Any, Any], Tensor] | None
    words: str

    @property
    def distribution(self) -> str | None:
        """Distribution of the output that the loss belongs to; None: there is none."""
        return None if self.likelihood is None else self.likelihood.output

    def of_examples(self, module: nn.Module, output: Any, batch: Any) -> Tensor:
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
    loss_scale: float | None = None,
) -> Loss:
    """Return the loss that the module, its output and the target tell.

    In this order: `loss_fn`, the module's own `losses(output, target)`, what
    `distribution` says, torch's loss that the module holds, cross entropy of logits and
    classes, half the squared distance to a target of the output's shape.

    Args:
        module: The network.
        output: Its output on the first examples of the batch.
        batch: The batch.
        distribution: `softmax`, `bernoulli`, `gaussian`, or `auto`.
        loss_fn: Takes output and target; returns the loss of each example, or their
            mean.
        loss_scale: The loss over the mean of the negative log-likelihoods; None: what
            the loss tells, else 1.

    Raises:
        ValueError: If an option can't be right, the loss tells no likelihood, or the
            output has no class for a label.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = type(output).__name__
        words = f"the output is a {found}, no tensor of logits or predictions"
        return Loss(None, _given(loss_fn), words)
    if not output.ndim:
        raise ValueError(
            f"the output of {type(module).__name__} is a single number; diagnose needs"
            " outputs of examples: give forward, a function of module and batch"
        )
    target = target_of(batch)
    likelihood, was_read = meant_likelihood(
        module,
        output,
        target,
        distribution=distribution,
        loss_fn=loss_fn,
        loss_scale=loss_scale,
    )
    if loss_fn is not None and not was_read:
        return Loss(likelihood, _given(loss_fn), "the given loss_fn")
    owns = loss_fn is None and callable(getattr(module, "losses", None))
    if owns and target is not None:
        return Loss(likelihood, _own_losses, f"the module's own, {likelihood.words}")
    few = target_of(take_rows(batch, slice(len(output))))
    if not isinstance(few, Tensor) or not _fits(likelihood.output, output, few):
        shape = tuple(few.shape) if isinstance(few, Tensor) else None
        about = "no target" if shape is None else f"a target of shape {shape}"
        output_shape = tuple(output.shape)
        words = f"{likelihood.words} of an output of shape {output_shape} and {about}"
        return Loss(likelihood, None, words)
    losses = likelihood.losses(target)
    return Loss(likelihood, lambda _, out, part: losses(out, part), likelihood.words)


def _given(
    loss_fn: LossFn | None,
) -> Callable[[nn.Module, Any, Any], Tensor] | None:
    if loss_fn is None:
        return None
    return lambda _, output, target: loss_fn(output, target)


def _own_losses(module: nn.Module, output: Any, target: Any) -> Tensor:
    losses: LossFn = module.losses  # type: ignore[assignment]
    return losses(output, target)


def _fits(distribution: str, output: Tensor, target: Tensor) -> bool:
    if distribution == "softmax" and not target.is_floating_point():
        return target.numel() * output.shape[class_dim_of(output)] == output.numel()
    if distribution == "softmax":
        return target.shape == output.shape
    return target.numel() == output.numel()

"""The loss of a probe batch, as the weighted mean of the losses of its examples.

Shapes: N rows, T positions of a row that are examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from lit_resnorm.measures.fisher.head import Layout
from lit_resnorm.measures.losses.comparison import Slope, Trained
from lit_resnorm.measures.losses.examples import LossFn
from lit_resnorm.measures.losses.labels import are_labels, check_labels
from lit_resnorm.measures.losses.likelihood import Likelihood
from lit_resnorm.measures.losses.options import LikelihoodOptions
from lit_resnorm.measures.losses.reading import likelihood_of_loss, own_loss
from lit_resnorm.measures.losses.reduction import losses_of, reduction_of
from lit_resnorm.measures.passes.batches import Forward, network_output, targets_of

LossesOfPositions = Callable[[Layout, Tensor, Any], Tensor]
"""Takes how an output lies, the output and its batch; returns losses `(N, T)`."""


@dataclass(frozen=True)
class ProbeLoss:
    """The loss of a batch: a factor times the weighted mean of examples' losses.

    Attributes:
        losses: Losses of examples, not weighted.
        output: Distribution of the output; `gaussian`, whose examples are whole rows,
            where the losses are of no known one.
        class_dim: Dimension of the output that counts an example's outputs.
        weights: Of this rank's examples, `(N,)` or as the labels; None: all the same.
        scale: The factor.
        is_likelihood: Whether the losses are negative log-likelihoods of `output`.
    """

    losses: LossesOfPositions
    output: str = "gaussian"
    class_dim: int | None = None
    weights: Tensor | None = None
    scale: float = 1.0
    is_likelihood: bool = False

    def weighted_sum(
        self, layout: Layout, output: Tensor, part: Any, shares: Tensor, slots: Tensor
    ) -> Tensor:
        """Return the sum of the losses of some rows, each times its share, 0-d.

        Args:
            layout: How the output lies.
            output: Of these rows, as the network gives it.
            part: Their batch.
            shares: Of the positions that count, `(N, S)`; those of 0 may be anything.
            slots: Which these are, likewise.
        """
        losses_NT = self.losses(layout, output, part).reshape(len(output), -1)
        counted_NS = losses_NT.gather(1, slots)
        return torch.where(shares > 0, shares * counted_NS, 0).sum()

    def mean(self, output: Tensor, batch: Any) -> Tensor:
        """Return the loss of a whole batch, 0-d; `weights` must be of the same."""
        shape = output.shape if output.ndim > 1 else torch.Size((len(output), 1))
        layout = Layout.of_output(self.output, shape, self.class_dim, empirical=False)
        losses_NT = self.losses(layout, output, batch)
        weights_NT = torch.ones_like(losses_NT)
        if self.weights is not None:
            given = self.weights.to(losses_NT)
            rows_N1 = given.reshape(len(losses_NT), -1)
            weights_NT = rows_N1.expand_as(losses_NT)
        weighed_NT = torch.where(weights_NT > 0, weights_NT * losses_NT, 0)
        return self.scale * weighed_NT.sum() / weights_NT.sum()


class ShapedForward:
    """A way to apply a model, which gives outputs back the shape that they had.

    Measures take an output of one dimension for a column.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._is_flat = False

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output."""
        output = self._forward(model, batch)
        self._is_flat = isinstance(output, Tensor) and output.ndim == 1
        return output

    def as_given(self, output: Tensor) -> Tensor:
        """Return the last output as the model gave it."""
        return output.flatten() if self._is_flat else output


def read_loss(
    module: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    output: str = "auto",
    loss_scale: float | None = None,
    class_dim: int | None = None,
    ignore_index: int | None = None,
    class_weights: Sequence[float] | None = None,
    target_fn: Callable[..., Any] = targets_of,
    forward_fn: Callable[..., Any] = network_output,
) -> ProbeLoss:
    """Return the loss of a batch, as a probe reads it; see `FIMEigenvalueProbe`.

    Args:
        module: The module.
        batch: Its examples, or this rank's share of them.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the loss is the mean; or one of torch's losses. None: the module's own,
            else cross entropy.
        output: `softmax`, `bernoulli`, `gaussian`, or `auto`.
        loss_scale: The loss over the mean of the negative log-likelihoods.
        class_dim: Dimension of the output that counts an example's outputs.
        ignore_index: Label of positions that are no examples.
        class_weights: Weights of the classes.
        target_fn: Takes a batch, returns its target.
        forward_fn: Takes the module and a batch, returns the output.

    Raises:
        ValueError: If the loss can't be read.
    """
    options = LikelihoodOptions(
        output,
        loss_scale,
        class_dim,
        ignore_index,
        class_weights,
        target_fn,
        forward_fn,
    )
    return probe_loss(options, module, batch, loss_fn)


def probe_loss(
    options: LikelihoodOptions,
    module: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
) -> ProbeLoss:
    """Return the loss that options and the module tell.

    In this order: `loss_fn`; the likelihood that the options name, or the module's loss
    tells; a loss of torch's that the module holds and that is none; the module's own
    `losses`; the likelihood that the output tells.

    Args:
        options: What is said of output, labels and weights.
        module: The module.
        batch: This rank's examples.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the loss is the mean; or one of torch's losses.

    Raises:
        ValueError: If the loss is summed over a batch, or takes no such weights.
    """
    given = loss_fn or _no_likelihood(options, module)
    if given is None:
        told = options.for_module(module)
        return ProbeLoss(
            lambda layout, output, part: likelihood_losses(
                told, layout, output, options.target_fn(part)
            ),
            told.output,
            options.class_dim,
            options.weights(module, batch),
            options.scale(module, batch),
            is_likelihood=True,
        )
    target = options.target_fn(batch)
    if target is None:
        raise ValueError("the probe batch has no target for its loss: give target_fn")
    reduction = reduction_of(module, target, len(target), given)
    if reduction.summed:
        raise ValueError(
            f"the loss is {type(given).__name__} with reduction='sum', whose curvature"
            " grows with the batch: give loss_fn, one with reduction='mean'"
        )
    scale = 1.0 if options.loss_scale is None else options.loss_scale

    def of_rows(layout: Layout, output: Tensor, part: Any) -> Tensor:
        del layout
        losses = losses_of(module, output, part, given, options.target_fn(part))
        return losses.reshape(len(output), -1)

    return ProbeLoss(
        of_rows,
        weights=None if reduction.is_mean else reduction.weights,
        scale=scale,
    )


def _no_likelihood(options: LikelihoodOptions, module: nn.Module) -> Any:
    """Return the module's loss where it is no likelihood, and none was named."""
    if options.output != "auto":
        return None
    held = own_loss(module)
    if isinstance(held, _Loss):
        try:
            likelihood_of_loss(held)
        except ValueError:
            return held
        return None
    own = getattr(module, "losses", None)
    return own if held is None and callable(own) else None


def likelihood_losses(
    told: Likelihood, layout: Layout, output: Tensor, target: Any
) -> Tensor:
    """Return negative log-likelihoods, shape `(N, T)`, neither weighted nor scaled.

    Those of positions that count for nothing may be anything.

    Args:
        told: Which likelihood.
        layout: How the output lies.
        output: Shape `(N, ...)`.
        target: Classes, probabilities of classes, or numbers.

    Raises:
        ValueError: If there is no target, or it doesn't fit the output.
    """
    if not isinstance(target, Tensor):
        raise ValueError(
            f"the probe batch has no target that is a tensor, but a"
            f" {type(target).__name__}: give target_fn"
        )
    if output.ndim == 1:
        output = output[:, None]
    kind = layout.output
    logits_NTC = layout.to_positions(output)
    if kind == "softmax" and are_labels(target):
        check_labels(kind, logits_NTC, target, ignore_index=told.ignore_index)
        labels_NT = target.reshape(len(output), -1)
        if labels_NT.shape != logits_NTC.shape[:2]:
            raise _unfit(output, target)
        labels_NT = labels_NT.where(labels_NT != told.ignore_index, 0).long()
        compared, logits = labels_NT.flatten(), logits_NTC.flatten(0, 1)
        losses = F.cross_entropy(
            logits, compared, label_smoothing=told.smoothing, reduction="none"
        )
        return losses.view_as(labels_NT)
    target = as_numbers(target, output)
    if target.numel() != output.numel():
        raise _unfit(output, target)
    shaped_NTC = layout.to_positions(target.reshape(output.shape).to(output.dtype))
    if kind == "softmax":
        even = 1 / shaped_NTC.shape[-1]
        shares_NTC = (1 - told.smoothing) * shaped_NTC + told.smoothing * even
        return -(shares_NTC * logits_NTC.log_softmax(-1)).sum(-1)
    if kind == "bernoulli":
        losses_NTC = F.binary_cross_entropy_with_logits(
            logits_NTC, shaped_NTC, reduction="none"
        )
    else:
        losses_NTC = (logits_NTC - shaped_NTC).square() / 2
    return losses_NTC.sum(-1)


def as_numbers(target: Tensor, output: Tensor) -> Tensor:
    """Return classes that are compared with an output `(N, C)` as unit vectors.

    Any other target stays as it is.
    """
    per_row = output.shape[1:].numel()
    if output.ndim != 2 or per_row < 2 or not are_labels(target):
        return target
    if target.numel() != len(output):
        return target
    return F.one_hot(target.reshape(-1).long(), per_row).to(output)


def _unfit(output: Tensor, target: Tensor) -> ValueError:
    return ValueError(
        f"an output of shape {tuple(output.shape)} has no target of shape"
        f" {tuple(target.shape)} ({target.dtype}): give loss_fn, output or target_fn"
    )


def check_trained(
    options: LikelihoodOptions, module: nn.Module, batch: Any, trained: Trained
) -> None:
    """Refuse a loss that was read and isn't the one that is trained.

    Stricter than for a Fisher matrix, which smoothed labels leave as it is.

    Args:
        options: What is said of output, labels and weights.
        module: The module.
        batch: The examples on which the training loss was taken.
        trained: The training loss.

    Raises:
        ValueError: With the options that mend it.
    """
    read = probe_loss(options, module, batch)
    loss = read.mean(trained.output, batch)
    if trained.slope.agrees(Slope.of_loss(loss, trained.weights)):
        return
    if _no_likelihood(options, module) is None:
        options.compare(module, batch, trained)
        raise ValueError(
            "the loss that training_step returns smooths its labels: give loss_fn,"
            " nn.CrossEntropyLoss(label_smoothing=...)"
        )
    raise ValueError(
        "the module's loss is not what training_step returns: give loss_fn (per"
        " example, without penalties) or forward_fn such that they agree"
    )

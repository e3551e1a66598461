"""Distributions of a network's output, as its loss tells them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

# Losses by the name that our modules give them, and torch's own.
_OUTPUTS = {"cross_entropy": "softmax", "mse": "gaussian"}
_LOSSES = {
    nn.CrossEntropyLoss: "softmax",
    nn.BCEWithLogitsLoss: "bernoulli",
    nn.MSELoss: "gaussian",
}


@dataclass(frozen=True)
class Likelihood:
    """The likelihood that a loss is, up to its sign and a factor.

    Attributes:
        output: Distribution of the output; `auto` where there is no loss to ask.
        scale: The loss over the mean of the negative log-likelihoods; None: `factor`
            over the number of an example's outputs.
        class_weights: Weights of the classes, shape `(C,)`.
        ignore_index: Label of positions that are no examples.
        factor: Of the squared distance, 2: the likelihood has half of it.
        smoothing: Share of each label that is spread over all classes.
    """

    output: str
    scale: float | None = 1.0
    class_weights: Tensor | None = None
    ignore_index: int = -100
    factor: float = 1.0
    smoothing: float = 0.0

    def weights(self, labels: Tensor | None) -> Tensor | None:
        """Return the weight of each example, float64; None where all weigh the same.

        Raises:
            ValueError: If classes have weights, and there are no labels of classes.
        """
        classes = labels is not None and not labels.is_floating_point()
        if labels is None or not classes:
            if self.class_weights is None:
                return None
            raise ValueError(
                "class_weights needs labels that are class indices, and the probe batch"
                " has none: give target_fn"
            )
        counted = labels != self.ignore_index
        if self.class_weights is None:
            return None if bool(counted.all()) else counted.double()
        of_class = self.class_weights.to(labels.device, torch.float64)
        num = len(of_class)
        known = labels.where(counted, 0)
        if bool(((known < 0) | (known >= num)).any()):
            raise ValueError(
                f"class_weights has {num} weights, and labels go from"
                f" {int(known.min())} to {int(known.max())}"
            )
        return of_class[known] * counted


def loss_of(module: nn.Module) -> str | _Loss | None:
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
    loss = loss_of(module)
    if loss is None:
        return "auto"
    return _OUTPUTS[loss] if isinstance(loss, str) else _distribution(loss)


def likelihood_of(module: nn.Module) -> Likelihood:
    """Return what a module's loss tells; see `likelihood_of_loss`."""
    loss = loss_of(module)
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

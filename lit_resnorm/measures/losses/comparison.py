"""Whether a loss that is trained is the likelihood that was read, on a few examples.

Two losses are taken for the same where their values and their gradients agree; the
gradients of the weights, which are those at the output by the chain rule, and the same
for an output of log-probabilities as for its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.measures.losses.labels import are_labels, class_dim_of
from lit_resnorm.measures.losses.likelihood import Likelihood


@dataclass(frozen=True)
class Slope:
    """A loss's value and its gradient.

    Attributes:
        value: 0-d, float64.
        gradient: Of all weights, flat, float64.
        tolerance: Relative, of the precision that it was computed in.
    """

    value: Tensor
    gradient: Tensor
    tolerance: float

    @classmethod
    def of_loss(cls, loss: Tensor, weights: Sequence[Tensor]) -> Slope:
        """Return value and gradient of a loss; its graph is kept."""
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(weight) if grad is None else grad
            for weight, grad in zip(weights, grads, strict=True)
        ]
        gradient = torch.cat([grad.double().flatten() for grad in flat])
        # half of the digits: two ways of summing over examples and positions
        return cls(loss.detach().double(), gradient, torch.finfo(loss.dtype).eps ** 0.5)

    def __add__(self, other: Slope) -> Slope:
        """Return the slope of the sum of two losses."""
        tolerance = max(self.tolerance, other.tolerance)
        return Slope(
            self.value + other.value, self.gradient + other.gradient, tolerance
        )

    def __rmul__(self, factor: float) -> Slope:
        """Return the slope of a multiple of the loss."""
        return Slope(factor * self.value, factor * self.gradient, self.tolerance)

    def agrees(self, other: Slope) -> bool:
        """Say whether both are those of the same loss."""
        tolerance = 10 * max(self.tolerance, other.tolerance)
        values = torch.maximum(self.value.abs(), other.value.abs())
        same_value = (self.value - other.value).abs() <= tolerance * (1 + values)
        return bool(same_value and self.descends_as(other))

    def descends_as(self, other: Slope) -> bool:
        """Say whether both have the same gradient, whatever their values are."""
        tolerance = 10 * max(self.tolerance, other.tolerance)
        apart = (self.gradient - other.gradient).norm()
        size = torch.maximum(self.gradient.norm(), other.gradient.norm())
        return bool(apart <= tolerance * size)


@dataclass(frozen=True)
class Trained:
    """The loss that is trained, on a few examples, with what they give.

    Attributes:
        slope: Of the loss.
        weights: What it depends on.
        output: The network's output, with its graph.
        inputs: Tensors of the batch, each of which may be a target.
    """

    slope: Slope
    weights: Sequence[Tensor]
    output: Tensor
    inputs: Sequence[Tensor]

    def is_meant_by(self, likelihood: Likelihood, target: Any) -> bool:
        """Say whether a likelihood's curvature is that of the loss.

        Labels that are smoothed leave the curvature as it is.

        Args:
            likelihood: What was read, with its distribution.
            target: What the output is compared with; without one, any tensor of the
                batch may be.
        """
        candidates = [target] if isinstance(target, Tensor) else self.inputs
        return any(self._is_meant_by(likelihood, each) for each in candidates)

    def _is_meant_by(self, likelihood: Likelihood, target: Tensor) -> bool:
        read = self._slope(likelihood, target, self.output)
        if read is None or self.slope.agrees(read):
            return read is not None
        if likelihood.output != "softmax" or likelihood.class_weights is not None:
            return False
        even = self._slope(replace(likelihood, smoothing=1.0), target, self.output)
        plain = self._slope(replace(likelihood, smoothing=0.0), target, self.output)
        if even is None or plain is None or even.value == plain.value:
            return False
        share = float((self.slope.value - plain.value) / (even.value - plain.value))
        smoothed = (1 - share) * plain + share * even
        return 0 < share < 1 and self.slope.agrees(smoothed)

    def advice(self, target: Any) -> str:
        """Return the options with which a likelihood is that of the loss; else none."""
        for likelihood, output, compared, words in self._candidates(target):
            plain = self._slope(likelihood, compared, output)
            if plain is None or not plain.value > 0:
                continue
            scale = float(self.slope.value / plain.value)
            if scale > 0 and self.slope.agrees(scale * plain):
                return words.format(scale=_scale_words(likelihood, scale, self.output))
        return (
            "it agrees with no likelihood that the probe knows; to measure one all the"
            " same, give output 'softmax', 'bernoulli' or 'gaussian', with loss_scale,"
            " class_weights, target_fn and forward_fn where they differ"
        )

    def _candidates(
        self, target: Any
    ) -> Iterator[tuple[Likelihood, Tensor, Tensor, str]]:
        """Yield likelihoods with output, target, and what to do for them."""
        output = self.output
        softmax, bernoulli, gaussian = (
            Likelihood(kind) for kind in ("softmax", "bernoulli", "gaussian")
        )
        plain = "give output {kind!r} and loss_scale {{scale}}"
        given = [target] if isinstance(target, Tensor) else []
        others = [each for each in self.inputs if all(each is not t for t in given)]
        for compared in (*given, *others):
            another = "" if given and compared is target else ", target_fn"
            for each in (softmax, bernoulli, gaussian):
                words = plain.format(kind=each.output) + (
                    another if each.output == "softmax" else ""
                )
                yield each, output, compared, words
            detached = output.detach()
            if bool(((detached >= 0) & (detached <= 1)).all()):
                logits = "the output holds probabilities: give forward_fn, to return "
                yield softmax, output.log(), compared, logits + "their logarithms"
                yield bernoulli, output.logit(), compared, logits + "logits"
            if are_labels(compared) and compared.ndim == 2 and output.ndim == 3:
                shifted = F.pad(compared[:, 1:], (0, 1), value=softmax.ignore_index)
                words = "labels are one position late: give target_fn, to shift them"
                yield softmax, output, shifted, words

    def _slope(
        self, likelihood: Likelihood, target: Tensor, output: Tensor
    ) -> Slope | None:
        """Return the slope of a likelihood's loss; None where there is none."""
        if likelihood.output == "gaussian" and _are_classes(output, target):
            # squared error of classes is that of their unit vectors
            dim = class_dim_of(output)
            units = F.one_hot(target.clamp_min(0), output.shape[dim])
            target = units.movedim(-1, 1) if dim == 1 else units
        if not fits(likelihood, output, target):
            return None
        num = 1 if likelihood.output == "softmax" else output[0].numel()
        read = replace(likelihood, num_outputs=num)
        try:
            loss = read.losses(target)(output, target).mean()
        except ValueError:
            return None  # labels beyond the classes, or none that counts
        return Slope.of_loss(loss, self.weights)


def fits(likelihood: Likelihood, output: Tensor, target: Tensor) -> bool:
    """Say whether a target is one of a likelihood of an output."""
    if likelihood.output != "softmax":
        return target.numel() == output.numel()
    if are_labels(target):
        return _are_classes(output, target, likelihood.ignore_index)
    return target.shape == output.shape and output.shape[class_dim_of(output)] > 1


def _are_classes(output: Tensor, target: Tensor, ignore_index: int = -100) -> bool:
    """Say whether a target names a class of each position of an output."""
    if not are_labels(target) or output.ndim < 2:
        return False
    num = output.shape[class_dim_of(output)]
    counted = target[target != ignore_index]
    known = bool(((counted >= 0) & (counted < num)).all())
    return known and num > 1 and target.numel() * num == output.numel()


def _scale_words(likelihood: Likelihood, scale: float, output: Tensor) -> str:
    """Return a scale in words: a sum over a batch grows with it."""
    rows = len(output)
    factor = 2 if likelihood.output == "gaussian" else 1
    if rows > 1 and abs(scale - factor * rows) < 1e-3 * scale:
        size = "the size" if factor == 1 else "twice the size"
        return f"{size} of the training batch (the loss is summed over it)"
    return f"{scale:.6g}"

"""The likelihood that is meant by a loss: losses of examples, and what weighs them.

Dimensions: B examples, C outputs or classes; targets and weights count positions too
where the network has several an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.diagnose.labels import class_dim
from lit_resnorm_callbacks.distributions import Likelihood


@dataclass(frozen=True)
class Meant:
    """The likelihood that is meant by a loss.

    Attributes:
        likelihood: Its distribution, class weights and label of what is ignored.
        scale: The loss over the weighted mean of the negative log-likelihoods.
        words: What it is.
        was_read: Whether it is the whole of a loss of torch's.
    """

    likelihood: Likelihood
    scale: float
    words: str
    was_read: bool

    @property
    def smoothing(self) -> float:
        """Share of each label that is spread over all classes."""
        return self.likelihood.smoothing

    @property
    def output(self) -> str:
        """Distribution of the output."""
        return self.likelihood.output

    def curvature(self, target: Any) -> tuple[Tensor | None, float]:
        """Return what makes the Fisher matrix the curvature of the loss.

        Args:
            target: Of all examples.

        Returns:
            Weights of the examples, None where all weigh the same, and a scale.

        Raises:
            ValueError: If classes have weights, and labels are no classes; if none of
                the labels counts.
        """
        weights = self.weights(target)
        of_class = self.likelihood.class_weights
        if weights is None or of_class is None or not self.smoothing:
            return weights, self.scale
        # a smoothed label weighs as its own class and as the mean of all
        even = of_class.double().mean() * (target != self.likelihood.ignore_index)
        smoothed = (1 - self.smoothing) * weights + self.smoothing * even
        return smoothed, self.scale * float(smoothed.sum() / weights.sum())

    def weights(self, target: Any) -> Tensor | None:
        """Return the weight of each example, float64; None where all weigh the same.

        Args:
            target: Of all examples.

        Raises:
            ValueError: As `curvature`.
        """
        labels = target if isinstance(target, Tensor) else None
        of_class = self.likelihood.class_weights
        if self.output != "softmax":
            labels = None
        elif of_class is not None and (labels is None or labels.is_floating_point()):
            raise ValueError(
                "the loss weighs classes, and so needs labels that are class indices"
            )
        weights = None if labels is None else self.likelihood.weights(labels)
        if weights is not None and not weights.any():
            raise ValueError(
                "no label counts: all are ignored by the loss, or of weight 0"
            )
        return weights

    def losses(self, target: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function from output and target to losses, shape `(B,)`.

        Their mean over all examples is the loss.

        Args:
            target: Of all examples.

        Raises:
            ValueError: As `curvature`.
        """
        weights = self.weights(target)
        share = 1.0 if weights is None else float(weights.mean())
        return lambda output, part: self._losses(output, part, self.scale / share)

    def _losses(self, output: Tensor, target: Tensor, scale: float) -> Tensor:
        if self.output == "softmax":
            losses = self._cross_entropies(output, target)
            return scale * (losses.flatten(1).mean(1) if losses.ndim > 1 else losses)
        shaped = target.reshape(output.shape).to(output.dtype)
        if self.output == "bernoulli":
            losses = F.binary_cross_entropy_with_logits(
                output, shaped, reduction="none"
            )
        else:
            losses = (output - shaped).square() / 2
        return scale * (losses.flatten(1).sum(1) if losses.ndim > 1 else losses)

    def _cross_entropies(self, output: Tensor, target: Tensor) -> Tensor:
        logits = output.movedim(class_dim(output), 1)
        if target.is_floating_point():
            labels = target.movedim(class_dim(output), 1)
        else:
            labels = target.reshape(logits.shape[:1] + logits.shape[2:])
        weight = self.likelihood.class_weights
        return F.cross_entropy(
            logits,
            labels,
            None if weight is None else weight.to(logits),
            ignore_index=self.likelihood.ignore_index,
            label_smoothing=self.smoothing,
            reduction="none",
        )

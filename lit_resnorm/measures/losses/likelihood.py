"""The likelihood that a loss is: what weighs and scales examples, and their losses.

Dimensions: B examples, C outputs or classes; targets and weights count positions too
where the network has several an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.measures.losses.examples import cross_entropies
from lit_resnorm.measures.losses.labels import are_labels

_NAMES = {
    "softmax": "cross entropy",
    "bernoulli": "binary cross entropy",
    "gaussian": "half the squared distance",
}


@dataclass(frozen=True)
class Likelihood:
    """The likelihood that a loss is, up to its sign and a factor.

    Attributes:
        output: Distribution of the output; `auto` where there is no loss to ask.
        scale: The loss over the mean of the negative log-likelihoods; None: `factor`
            over `num_outputs`.
        class_weights: Weights of the classes, shape `(C,)`.
        ignore_index: Label of positions that are no examples.
        factor: Of the squared distance, 2: the likelihood has half of it.
        smoothing: Share of each label that is spread over all classes.
        num_outputs: How many numbers of an example are compared with a target's.
    """

    output: str
    scale: float | None = 1.0
    class_weights: Tensor | None = None
    ignore_index: int = -100
    factor: float = 1.0
    smoothing: float = 0.0
    num_outputs: int = 1

    @property
    def loss_scale(self) -> float:
        """The loss over the mean of the negative log-likelihoods."""
        return self.factor / self.num_outputs if self.scale is None else self.scale

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        num, scale = self.num_outputs, self.loss_scale
        name = _NAMES[self.output]
        if self.class_weights is not None:
            name += ", classes weighted"
        squared = self.output == "gaussian"
        mean = 2 / num if squared else 1 / num
        if math.isclose(scale, mean) and (squared or num > 1):
            name = "squared error" if squared else name
            name = name if num == 1 else f"{name}, averaged over {num} outputs"
        elif not math.isclose(scale, 1.0):
            name = f"{scale:g} times {name}"
        elif num > 1 and not squared:
            name = f"{name}, summed over {num} outputs"
        smoothed = f", labels smoothed by {self.smoothing:g}" if self.smoothing else ""
        return name + smoothed

    def weights(self, target: Any) -> Tensor | None:
        """Return the weight of each example, float64; None where all weigh the same.

        Raises:
            ValueError: If classes have weights, and there are no labels of classes.
        """
        if not are_labels(target):
            if self.class_weights is None:
                return None
            raise ValueError(
                "the loss weighs classes, and so needs labels that are class indices"
            )
        counted = target != self.ignore_index
        if self.class_weights is None:
            return None if bool(counted.all()) else counted.double()
        of_class = self.class_weights.to(target.device).double()
        num = len(of_class)
        known = target.where(counted, 0)
        if bool(((known < 0) | (known >= num)).any()):
            raise ValueError(
                f"class_weights has {num} weights, and labels go from"
                f" {int(known.min())} to {int(known.max())}"
            )
        return of_class[known] * counted

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
        weights = self._weights_that_count(target)
        if weights is None or self.class_weights is None or not self.smoothing:
            return weights, self.loss_scale
        # a smoothed label weighs as its own class and as the mean of all
        even = self.class_weights.double().mean() * (target != self.ignore_index)
        smoothed = (1 - self.smoothing) * weights + self.smoothing * even
        return smoothed, self.loss_scale * float(smoothed.sum() / weights.sum())

    def losses(self, target: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function from output and target to losses, shape `(B,)`.

        Their mean over all examples is the loss.

        Args:
            target: Of all examples.

        Raises:
            ValueError: As `curvature`.
        """
        weights = self._weights_that_count(target)
        share = 1.0 if weights is None else float(weights.mean())
        scale = self.loss_scale / share
        return lambda output, part: scale * self._losses(output, part)

    def _weights_that_count(self, target: Any) -> Tensor | None:
        weights = self.weights(target) if self.output == "softmax" else None
        if weights is not None and not weights.any():
            raise ValueError(
                "no label counts: all are ignored by the loss, or of weight 0"
            )
        return weights

    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        if self.output == "softmax":
            losses = cross_entropies(
                output,
                target,
                class_weights=self.class_weights,
                ignore_index=self.ignore_index,
                smoothing=self.smoothing,
            )
            return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        shaped = target.reshape(output.shape).to(output.dtype)
        if self.output == "bernoulli":
            losses = F.binary_cross_entropy_with_logits(
                output, shaped, reduction="none"
            )
        else:
            losses = (output - shaped).square() / 2
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

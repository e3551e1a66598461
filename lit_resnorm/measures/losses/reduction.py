"""How the losses of single examples make the loss of a batch, read from torch's losses.

Dimensions: B examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import loss as torch_losses
from torch.nn.modules.loss import _Loss

from lit_resnorm.measures.losses.examples import LossFn
from lit_resnorm.measures.losses.labels import are_labels, class_dim_of
from lit_resnorm.measures.losses.reading import own_loss
from lit_resnorm.measures.passes.batches import LABELS, target_of

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_LOSS_FUNCTIONS: dict[Any, type[_Loss]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


@dataclass(frozen=True)
class Reduction:
    """How a batch's loss is made of those of its examples.

    Attributes:
        weights: Weights of the examples, shape `(B,)`, float64.
        summed: Whether the loss is their sum; else the weighted mean.
    """

    weights: Tensor
    summed: bool = False

    @property
    def is_mean(self) -> bool:
        """Whether the loss is the plain mean of the examples' losses."""
        return not self.summed and bool((self.weights == self.weights[:1]).all())

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        if self.is_mean:
            return "mean"
        return "sum" if self.summed else "weighted mean"

    def of_losses(self, losses_B: Tensor) -> Tensor:
        """Return the loss of the batch, 0-d."""
        weights_B = self.weights.to(losses_B)
        total = (losses_B * weights_B).sum()
        return total if self.summed else total / weights_B.sum()

    def check(self, name: str, losses_B: Tensor, loss: Tensor) -> None:
        """See that the examples' losses make the run's loss.

        Args:
            name: The probe's name, for the message.
            losses_B: Losses of the examples of a batch.
            loss: The run's loss of the batch, 0-d.

        Raises:
            ValueError: If they don't, beyond rounding.
        """
        made, own = self.of_losses(losses_B.double()), loss.detach().double()
        tolerance = torch.finfo(losses_B.dtype).eps ** 0.5
        if not torch.isclose(own, made, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"{name}: the training loss of the first batch is {own:.8g}, and its"
                f" examples' losses have the {self.words} {made:.8g}: give loss_fn (per"
                " example, without penalties) or forward_fn such that they agree"
            )


@dataclass(frozen=True)
class ExampleLosses:
    """What a loss of torch's gives single examples, and what it makes of a batch.

    Attributes:
        loss: The loss, of output and target.
    """

    loss: _Loss

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each example alone, shape `(B,)`; 0 where none counts.

        Raises:
            ValueError: If the loss doesn't take the two.
        """
        each = copy.copy(self.loss)
        each.reduction = "none"
        try:
            # A loss that is given, and held by no module, stays where it was made.
            own = {name: x if x is None else x.to(output) for name, x in _buffers(each)}
            vars(each)["_buffers"] = own
            if isinstance(each, _OF_CLASSES):
                parts = _of_classes(each, output, target)
            else:
                parts = each(output, _shaped_like(output, target))
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as no:
            raise ValueError(
                f"there is no {type(self.loss).__name__} of {_value_in_words(output)}"
                f" and {_value_in_words(target)}: {no}"
            ) from no
        if self.loss.reduction in ("sum", "batchmean"):
            return _over_positions(parts)
        if isinstance(each, _OF_CLASSES) and are_labels(target):
            weights_B = self._label_weights(target)
            counted_B = torch.where(weights_B > 0, weights_B, 1.0)
            return _over_positions(parts) / counted_B.to(parts)
        return parts.flatten(1).mean(1) if parts.ndim > 1 else parts

    def reduction(self, target: Tensor) -> Reduction:
        """Return what makes the loss of a batch of those of its examples."""
        summed = self.loss.reduction == "sum"
        if (
            self.loss.reduction == "mean"
            and isinstance(self.loss, _OF_CLASSES)
            and are_labels(target)
        ):
            return Reduction(self._label_weights(target))
        ones_B = torch.ones(len(target), dtype=torch.float64, device=target.device)
        return Reduction(ones_B, summed)

    def _label_weights(self, target: Tensor) -> Tensor:
        """Return the sums of the weights of examples' labels, float64."""
        loss: Any = self.loss
        counted = target != loss.ignore_index
        weights = counted.double()
        if loss.weight is not None and loss.reduction != "none":
            of_class = loss.weight.double().to(target.device)
            weights = weights * of_class[target.where(counted, 0)]
        return _over_positions(weights)


def losses_of_examples(module: nn.Module, loss_fn: LossFn | None = None) -> LossFn:
    """Return what gives the losses of examples.

    In this order: `loss_fn`, the module's own `losses`, torch's loss that the module
    holds, cross entropy. A loss of torch's is one of :class:`ExampleLosses`.

    Args:
        module: The module.
        loss_fn: Takes output and target, returns the loss of each example; or a loss of
            torch's with any reduction.
    """
    if loss_fn is not None:
        made = [
            kind() for function, kind in _LOSS_FUNCTIONS.items() if loss_fn is function
        ]
        given: Any = made[0] if made else loss_fn
        return ExampleLosses(given) if _is_reduced(given) else loss_fn
    if callable(getattr(module, "losses", None)):
        own: Any = module.losses
        return own
    held = own_loss(module)
    if isinstance(held, _Loss) and type(held).__module__ == torch_losses.__name__:
        return ExampleLosses(held)
    return _usual_losses


def reduction_of(
    module: nn.Module, target: Any, num: int, loss_fn: LossFn | None = None
) -> Reduction:
    """Return what makes a batch's training loss of the losses of its examples.

    Args:
        module: The module.
        target: The batch's target.
        num: Number of its examples.
        loss_fn: As for `losses_of_examples`; its own losses are averaged.
    """
    losses = losses_of_examples(module, loss_fn)
    if losses is _usual_losses:
        losses = ExampleLosses(nn.CrossEntropyLoss())
    if isinstance(losses, ExampleLosses) and isinstance(target, Tensor):
        return losses.reduction(target)
    return Reduction(torch.ones(num, dtype=torch.float64))


def losses_of(
    module: nn.Module,
    output: Any,
    batch: Any,
    loss_fn: LossFn | None,
    target: Any = None,
) -> Tensor:
    """Return the loss of each example, shape `(B,)`, by `losses_of_examples`.

    Losses of several positions of an example are averaged.

    Args:
        module: The module.
        output: The network's output on the batch.
        batch: Holds the target as a pair's second element, or under a usual name.
        loss_fn: Gives the losses; None: the module's own, else cross entropy.
        target: The target, where it is given.

    Raises:
        ValueError: If there is no target, or the loss doesn't take it.
    """
    target = target_of(batch) if target is None else target
    if target is None:
        holds = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else ""
        raise ValueError(
            f"a batch that is a {type(batch).__name__} {holds} has no target: a pair's"
            f" second element, or one of {', '.join(LABELS)}; else give target_fn"
        )
    losses = losses_of_examples(module, loss_fn)(output, target)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def _usual_losses(output: Any, target: Any) -> Tensor:
    """Return cross entropies; binary ones of one logit for each number."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise ValueError(
            f"there is no cross entropy of {_value_in_words(output)} and"
            f" {_value_in_words(target)}"
        )
    numbers = target.is_floating_point() and target.numel() == output.numel()
    binary = numbers and (output.ndim == 1 or output.shape[class_dim_of(output)] == 1)
    return ExampleLosses(nn.BCEWithLogitsLoss() if binary else nn.CrossEntropyLoss())(
        output, target
    )


def _is_reduced(loss: Any) -> bool:
    """Say whether it is a loss of torch's that reduces a batch."""
    of_torch = type(loss).__module__ == torch_losses.__name__
    return isinstance(loss, _Loss) and of_torch and loss.reduction != "none"


def _of_classes(each: _Loss, output: Tensor, target: Tensor) -> Tensor:
    """Return the weighted losses of the positions of examples."""
    logits = output.movedim(class_dim_of(output), 1)
    if target.is_floating_point():
        return each(logits, target.movedim(class_dim_of(output), 1))
    return each(logits, target.reshape(logits.shape[:1] + logits.shape[2:]))


def _shaped_like(output: Tensor, target: Tensor) -> Tensor:
    if target.numel() != output.numel():
        return target
    return target.reshape(output.shape).to(output.dtype)


def _buffers(loss: _Loss) -> Iterable[tuple[str, Tensor | None]]:
    return vars(loss)["_buffers"].items()


def _over_positions(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _value_in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    return f"a {type(value).__name__}"

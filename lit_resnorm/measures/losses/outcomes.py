"""What outputs are worth, example by example: their losses, and whether they are right.

Dimensions: B examples, C classes, T positions of an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from lit_resnorm.measures.losses.examples import LossFn
from lit_resnorm.measures.losses.labels import are_labels, class_dim_of
from lit_resnorm.measures.losses.reading import own_loss
from lit_resnorm.measures.losses.reduction import losses_of
from lit_resnorm.measures.passes.batches import target_of

_CLASSIFYING = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.BCEWithLogitsLoss,
    nn.MultiMarginLoss,
    nn.SoftMarginLoss,
)


@dataclass(frozen=True)
class Classified:
    """Predicted classes of some examples, float64, each of shape `(B, T)`.

    Attributes:
        right: 1 where the likeliest class is the label, 0 elsewhere; NaN where a logit
            is.
        counts: 1 where there is a label, 0 where it is ignored.
        own: Probability of the label.
        other: Largest probability of another class.
        entropy: Of the probabilities, in nats.
    """

    right: Tensor
    counts: Tensor
    own: Tensor
    other: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class OutputJudge:
    """How outputs of a network are judged, against the targets of a batch.

    Attributes:
        loss_fn: Takes output and target and returns the loss of each example, or is a
            loss of torch's. None: the module's own `losses`, else torch's loss that it
            holds, else cross entropy.
        target_fn: Takes a batch, returns its target.
    """

    loss_fn: LossFn | None = None
    target_fn: Callable[[Any], Any] = target_of

    def losses(self, module: nn.Module, output: Any, batch: Any) -> Tensor:
        """Return the loss of each example, shape `(B,)`, differentiable.

        Raises:
            ValueError: If there is no target, or the loss doesn't take it.
        """
        return losses_of(
            module, output, batch, self.loss_fn, target=self.target_fn(batch)
        )

    def classified(
        self, module: nn.Module, output: Any, batch: Any
    ) -> Classified | None:
        """Return the predicted classes; None where the targets are no classes."""
        ignored = getattr(own_loss(module), "ignore_index", -100)
        found = self._logits_and_labels(module, output, self.target_fn(batch))
        if found is None:
            return None
        logits_BCT, labels_BT = found[0].detach().double(), found[1]
        counts_BT = labels_BT != ignored
        labels_BT = labels_BT.where(counts_BT, 0).long()
        broken_BT = logits_BCT.isnan().any(1)
        right_BT = (logits_BCT.argmax(1) == labels_BT).double()
        logs_BCT = logits_BCT.log_softmax(1)
        shares_BCT = logs_BCT.exp()
        own_BT = shares_BCT.gather(1, labels_BT[:, None])[:, 0]
        others_BCT = shares_BCT.scatter(1, labels_BT[:, None], -1.0)
        # a class of probability 0 adds nothing
        bits_BCT = torch.where(shares_BCT == 0, 0.0, shares_BCT * logs_BCT)
        return Classified(
            right=right_BT.masked_fill(broken_BT, torch.nan),
            counts=counts_BT.double(),
            own=own_BT,
            other=others_BCT.amax(1),
            entropy=-bits_BCT.sum(1),
        )

    def _logits_and_labels(
        self, module: nn.Module, output: Any, target: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Return logits `(B, C, T)` and labels `(B, T)`, where these are classes."""
        told = own_loss(module)
        other = isinstance(told, _Loss) and not isinstance(told, _CLASSIFYING)
        if other or told == "mse" or isinstance(self.loss_fn, nn.MSELoss):
            return None
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return None
        if not output.ndim or not output.is_floating_point():
            return None
        num, dim = len(output), class_dim_of(output)
        if output.ndim == 1 or output.shape[dim] == 1:
            binary = ((target == 0) | (target == 1)).all()
            if target.numel() != output.numel() or not binary:
                return None
            logits_BT = output.reshape(num, -1)
            pair = torch.stack([torch.zeros_like(logits_BT), logits_BT], 1)
            return pair, target.reshape(num, -1)
        if not are_labels(target) or target.numel() * output.shape[dim] != (
            output.numel()
        ):
            return None
        logits_BC = output.movedim(dim, 1)
        return logits_BC.reshape(*logits_BC.shape[:2], -1), target.reshape(num, -1)

"""The losses of the probe batch's examples, read from the module's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_resnorm.measures.losses import LossFn, losses_of, reduction_of
from lit_resnorm.measures.passes.batch_dim import as_given
from lit_resnorm.measures.passes.batches import num_rows
from lit_resnorm_callbacks.probe.training_loss import NotComparableError, trained_loss


@dataclass(frozen=True)
class ExampleLossOptions:
    """A probe's options about the losses of examples.

    Attributes:
        loss_fn: Takes output and target, returns the loss of each example; or one of
            torch's losses. None: the module's own `losses`, else torch's loss that it
            holds, else cross entropy.
        target_fn: Takes a batch, returns its target.
        forward_fn: Takes the module and a batch, returns the output.
        norm_mode: What batch norm does where the loss is compared.
        batch_dim: Dimension that counts examples in a batch as the module takes it.
    """

    loss_fn: LossFn | None
    target_fn: Callable[..., Any]
    forward_fn: Callable[..., Any]
    norm_mode: str
    batch_dim: int

    def of_output(self, module: LightningModule, output: Any, batch: Any) -> Tensor:
        """Return the loss of each example, shape `(B,)`."""
        target = self.target_fn(batch)
        return losses_of(module, output, batch, self.loss_fn, target)

    def weights(self, module: LightningModule, batch: Any) -> Tensor:
        """Return the weight of each example in the mean, shape `(B,)`, float64."""
        return self._reduction(module, batch).weights

    def given(self, batch: Any) -> Any:
        """Return a batch as the module takes it."""
        return as_given(batch, self.batch_dim) if self.batch_dim else batch

    def compare(self, module: LightningModule, few: Any) -> str:
        """See that the losses of a few examples make their training loss.

        Returns:
            Why they can't be compared; empty where they agree.

        Raises:
            ValueError: If they don't make it, or there are none.
        """
        given = self.given(few)
        try:
            with trained_loss(
                module,
                lambda: self.forward_fn(module, few),
                few,
                given,
                self.norm_mode,
            ) as trained:
                losses = self.of_output(module, trained.output, few)
                self._reduction(module, few).check("", losses, trained.slope.value)
        except NotComparableError as error:
            return str(error)
        return ""

    def _reduction(self, module: LightningModule, batch: Any) -> Any:
        target = self.target_fn(batch)
        return reduction_of(module, target, num_rows(batch), self.loss_fn)

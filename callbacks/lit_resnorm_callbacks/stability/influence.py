"""Influence functions in a run: estimates of the twins, at each measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_resnorm.measures.copies.copies import Copies, trained_parameters
from lit_resnorm.measures.copies.influence import check_influence, influence_copies
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm_callbacks.stability.left_out import LeftOut


@dataclass(frozen=True)
class Influence:
    """Estimates of a run's twins.

    Attributes:
        trained: Names of the parameters that the run trains.
        num_train: Size of the training set.
        decay: The run's weight decay.
        damping: Added to the Gauss-Newton matrix beside it.
        norm_mode: What batch norm does.
        forward_fn: Takes module and batch, returns the output.
        losses: Takes module, output and batch, returns losses of examples.
        reduction: Takes module and batch, says what makes its loss of these.
    """

    trained: list[str]
    num_train: int
    decay: float
    damping: float
    norm_mode: str
    forward_fn: Callable[[Any, Any], Any]
    losses: Callable[[Any, Any, Any], Tensor]
    reduction: Callable[[Any, Any], Reduction]

    @classmethod
    def of_run(
        cls,
        trainer: Trainer,
        module: LightningModule,
        *,
        num_train: int,
        **options: Any,
    ) -> Influence:
        """Return the estimates of a run that is about to train."""
        optimizer = trainer.optimizers[0]
        return cls(
            trained_parameters(module, optimizer),
            num_train,
            optimizer.param_groups[0].get("weight_decay", 0.0),
            **options,
        )

    def check(self, module: LightningModule, batch: Any, name: str) -> None:
        """See that the module's outputs and losses have the derivatives that it takes.

        Args:
            module: The module.
            batch: A few examples.
            name: The probe's name, for the message.

        Raises:
            ValueError: If they haven't; what hasn't is named.
        """
        try:
            check_influence(
                module,
                self.forward_fn,
                lambda output, of: self.losses(module, output, of),
                self.trained,
                batch,
                norm_mode=self.norm_mode,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def copies(
        self,
        module: LightningModule,
        batch: Any,
        left_out: LeftOut,
        *,
        num_rows: int,
        reduce: Reduce,
    ) -> Copies:
        """Return where training without each example that was seen would end.

        Args:
            module: The module at its current weights.
            batch: This rank's share of the probe batch.
            left_out: The examples.
            num_rows: Rows of a training batch, over which a summed loss is summed.
            reduce: Sums over ranks.
        """
        summed = self.reduction(module, batch).summed
        return influence_copies(
            module,
            self.forward_fn,
            lambda output, of: self.losses(module, output, of),
            self.trained,
            batch,
            left_out.examples(),
            left_out.seen,
            len(left_out.removed),
            num_train=self.num_train,
            reduction=lambda of: self.reduction(module, of),
            decay=self.decay / num_rows if summed else self.decay,
            damping=self.damping,
            norm_mode=self.norm_mode,
            reduce=reduce,
        )

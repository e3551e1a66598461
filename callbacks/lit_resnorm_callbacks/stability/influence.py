"""Influence functions in a run: estimates of the twins, at each measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_resnorm.measures.copies.copies import Copies, trained_parameters
from lit_resnorm.measures.copies.influence import influence_copies
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
    """

    trained: list[str]
    num_train: int
    decay: float
    damping: float
    norm_mode: str

    @classmethod
    def of_run(
        cls,
        trainer: Trainer,
        module: LightningModule,
        *,
        num_train: int,
        damping: float,
        norm_mode: str,
    ) -> Influence:
        """Return the estimates of a run that is about to train."""
        optimizer = trainer.optimizers[0]
        return cls(
            trained_parameters(module, optimizer),
            num_train,
            optimizer.param_groups[0].get("weight_decay", 0.0),
            damping,
            norm_mode,
        )

    def copies(
        self,
        module: LightningModule,
        batch: Any,
        left_out: LeftOut,
        *,
        forward_fn: Any,
        losses: Callable[[Any, Any, Any], Tensor],
        reduce: Reduce,
    ) -> Copies:
        """Return where training without each example that was seen would end.

        Args:
            module: The module at its current weights.
            batch: This rank's share of the probe batch.
            left_out: The examples.
            forward_fn: Takes module and batch, returns the output.
            losses: Takes module, output and batch, returns losses of examples.
            reduce: Sums over ranks.
        """
        return influence_copies(
            module,
            forward_fn,
            lambda output, of: losses(module, output, of),
            self.trained,
            batch,
            left_out.examples(),
            left_out.seen,
            len(left_out.removed),
            num_train=self.num_train,
            decay=self.decay,
            damping=self.damping,
            norm_mode=self.norm_mode,
            reduce=reduce,
        )

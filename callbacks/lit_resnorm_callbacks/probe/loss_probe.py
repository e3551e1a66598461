"""What probes of the module's loss share: how it is read, and that it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_resnorm.measures.fisher import Examinations, check_readable
from lit_resnorm.measures.losses import LikelihoodOptions, LossFn
from lit_resnorm.measures.losses.probe_loss import ProbeLoss, check_trained, probe_loss
from lit_resnorm.measures.passes.batch_dim import as_given, targets_first
from lit_resnorm.measures.passes.batches import num_rows, take_rows, targets_of
from lit_resnorm_callbacks.probe.cadence import Cadence
from lit_resnorm_callbacks.probe.probe import Batch, Probe
from lit_resnorm_callbacks.probe.training_loss import NotComparableError, trained_loss

_NUM_COMPARED = 8
"""Examples on which the loss is compared with the training loss."""


class LossProbe(Probe):
    """A measurement of derivatives of the module's own loss.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        output: As for `FIMEigenvalueProbe`.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the loss is the mean; or one of torch's losses.
        loss_scale: As for `FIMEigenvalueProbe`.
        class_dim: Likewise.
        ignore_index: Likewise.
        class_weights: Likewise.
        target_fn: Likewise.
        memory: Bytes that a pass may take.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right.
    """

    def __init__(
        self,
        name: str,
        cadence: Cadence | int,
        num_examples: int,
        *,
        output: Literal["auto", "softmax", "bernoulli", "gaussian"] = "auto",
        loss_fn: LossFn | None = None,
        loss_scale: float | None = None,
        class_dim: int | None = None,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        target_fn: Callable[..., Any] = targets_of,
        memory: int = 2**30,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if memory < 1:
            raise ValueError(f"memory is {memory}; it must be at least 1 byte")
        if loss_fn is not None and output != "auto":
            raise ValueError(
                f"output is {output!r} and loss_fn is given: each says what the loss"
                " is; give one"
            )
        self.likelihood = LikelihoodOptions(
            output,
            loss_scale,
            class_dim,
            ignore_index,
            class_weights,
            targets_first(target_fn, self.batch_dim),
            self.forward_fn,
        )
        self.loss_fn = loss_fn
        self.memory = memory
        self._examinations = Examinations()

    def smaller(self) -> bool:
        """Take a quarter of the memory, down to a mebibyte."""
        self.memory //= 4
        return self.memory >= 2**20

    def check(self, trainer: Trainer, module: LightningModule, few: Batch) -> None:
        """Refuse what a few examples show can't be measured, with a ValueError."""

    def read_loss(self, module: LightningModule, batch: Batch) -> ProbeLoss:
        """Return the loss of a batch."""
        return probe_loss(self.likelihood, module, batch, self.loss_fn)

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._examinations = Examinations()
        try:
            check_readable(module)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        super()._prepare(trainer, module)
        if not num_rows(self._batch):
            return
        try:
            if self.read_loss(module, self._batch).is_likelihood:
                self.likelihood.check(module, self._batch)
            self.check(trainer, module, take_rows(self._batch, slice(2)))
            told = self.loss_fn is None and self.likelihood.is_guess(module)
            if trainer.training and told:
                self._compare(module)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self.name}: {type(module).__name__}'s loss can't be measured"
                f" ({type(error).__name__}: {error}): give loss_fn, output, forward_fn"
                " or target_fn"
            ) from error

    def _compare(self, module: LightningModule) -> None:
        """See that the loss that is read is the one that is trained."""
        few = take_rows(self._batch, slice(_NUM_COMPARED))
        given = as_given(few, self.batch_dim) if self.batch_dim else few
        try:
            with trained_loss(
                module,
                lambda: self.forward_fn(module, few),
                few,
                given,
                self.norm_mode,
            ) as trained:
                check_trained(self.likelihood, module, few, trained)
        except NotComparableError as error:
            rank_zero_info(
                f"{self.name}: the loss that is measured was not compared with the"
                f" training loss: {error}"
            )

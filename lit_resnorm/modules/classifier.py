"""`LitClassifier`: trains any `nn.Module` and logs losses that are exact over ranks."""

import inspect
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_resnorm.modules.losses import (
    LOSSES,
    SUM_DTYPE,
    EpochMeans,
    example_losses,
    sum_over_ranks,
)
from lit_resnorm.modules.optimizers import (
    default_optimizer,
    drop_step,
    outermost_init,
    scheduled,
)
from lit_resnorm.nets.layers import choose
from lit_resnorm.quantities.explanations import reference

__all__ = ["LitClassifier"]


class LitClassifier(L.LightningModule):
    """Trains a network on `(x, y)` or `(x, y, index)` batches.

    Logs `train/loss` (mean over the global batch, at the steps that the trainer logs);
    `train/loss_epoch`, `train/accuracy`; `val/loss`, `val/accuracy`; `test/loss`,
    `test/accuracy`; and `generalization_gap`, at each validation of a fit: `val/loss`
    minus the mean of the training loss over the epoch so far. Means are sums over
    examples of all ranks divided by their number, and a run resumed within an epoch
    goes on with its sums.

    Args:
        net: From inputs to outputs of shape `(B, num_classes)`.
        loss: `cross_entropy`, or `mse`: half the squared distance to the target (a
            class as a one-hot vector), summed over outputs. Both are means over
            examples.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimizer; `ReduceLROnPlateau` watches `val/loss`.
        lr_interval: Whether the scheduler steps each `epoch` or optimizer `step` (as
            OneCycleLR needs).
        num_classes: Number of outputs, compared with the data's; None: not compared.
        on_divergence: What a training loss that isn't finite does: `stop` ends the
            training without that optimizer step, `continue` goes on regardless.

    Attributes:
        diverged: Whether a training loss wasn't finite since the start of the fit, in
            the processes before the one that goes on from a checkpoint too.

    Raises:
        ValueError: On another `loss`, `lr_interval` or `on_divergence`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        loss: str = "cross_entropy",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        num_classes: int | None = None,
        on_divergence: str = "stop",
    ) -> None:
        super().__init__()
        frame = outermost_init(self)
        ignore = ["net", "optimizer", "lr_scheduler"]
        self.save_hyperparameters(ignore=ignore, frame=frame, logger=False)
        if "_instantiator" in self.hparams:
            # LightningCLI gives plain class paths for these, which load anywhere.
            self.save_hyperparameters(frame=frame, logger=False)
        self.net = net
        self.loss = choose("loss", loss, LOSSES)
        # jsonargparse can only show and override a default that is a lambda, and
        # spawned processes can only receive one that isn't.
        default = inspect.signature(LitClassifier).parameters["optimizer"].default
        self.optimizer = default_optimizer if optimizer is default else optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = choose("lr_interval", lr_interval, ("epoch", "step"))
        self.num_classes = num_classes
        self.on_divergence = choose(
            "on_divergence", on_divergence, ("stop", "continue")
        )
        self.diverged = False
        self._had_diverged = False
        self._finite: Tensor | None = None
        self.train_means = EpochMeans()
        self.val_means = EpochMeans()
        self.test_means = EpochMeans()

    def setup(self, stage: str) -> None:
        """Compare the number of outputs with the data's classes.

        Raises:
            ValueError: If the data module has another number of classes.
        """
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if None not in (classes, self.num_classes) and classes != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} of the model, but the data has "
                f"{classes} ({stage})"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with its scheduler where there is one.

        Raises:
            ValueError: If `ReduceLROnPlateau` should step at each optimizer step.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer(params)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return scheduled(optimizer, scheduler, self.lr_interval)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (logits), shape `(B, num_classes)`."""
        return self.net(x)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each example, shape `(B,)`; see `example_losses`."""
        return example_losses(self.loss, output, target)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over this rank's batch."""
        if batch_idx == 0:
            self.train_means.reset()
        losses, sums = self._evaluate(batch)
        self.train_means.update(sums)
        total, _, count = sum_over_ranks(self.trainer, sums)
        mean = total / count
        finite = torch.isfinite(mean)
        self._finite = finite if self._finite is None else self._finite & finite
        if self._shows(batch_idx):
            self.log("train/loss", mean, prog_bar=True, batch_size=len(losses))
        return losses.sum() / max(len(losses), 1)

    def _shows(self, batch_idx: int) -> bool:
        """Return whether this batch's loss is for a logger, bar or callback.

        `log` takes 0.4 ms, a quarter of a small net's step: so it is called where a row
        is due, and for bar and callbacks at each tenth batch and an epoch's last.
        """
        trainer = self.trainer
        every = max(getattr(trainer, "log_every_n_steps", 1), 1)
        due = (trainer.global_step + 1) % every == 0
        return due or batch_idx % 10 == 0 or trainer.is_last_batch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the step, and stop, where a loss of its batches wasn't finite."""
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        self.diverged = True
        if self.on_divergence == "continue":
            return
        rank_zero_warn(
            f"the training loss at step {self.global_step} isn't finite: training "
            "stops with the weights from before (on_divergence='continue' goes on);"
            f" see {reference('loss_not_finite')}"
        )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        drop_step(optimizer, scaled=scaler is not None)
        self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        """Begin healthy, or as the checkpoint is that is gone on from."""
        self.diverged, self._had_diverged = self._had_diverged, False

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means."""
        means = self.train_means.compute()
        self._log_epoch("train/loss_epoch", means["loss"])
        self._log_epoch("train/accuracy", means["accuracy"])

    def on_validation_epoch_start(self) -> None:
        """Start over."""
        self.val_means.reset()

    def validation_step(self, batch: Sequence[Tensor]) -> None:
        """Add a batch to the means."""
        self.val_means.update(self._evaluate(batch)[1])

    def on_validation_epoch_end(self) -> None:
        """Log the means, and in a fit the gap to the training loss."""
        loss = self._log_means("val", self.val_means)
        trainer = self.trainer
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            train_loss = self.train_means.compute()["loss"]
            self._log_epoch("generalization_gap", loss - train_loss)

    def on_test_epoch_start(self) -> None:
        """Start over."""
        self.test_means.reset()

    def test_step(self, batch: Sequence[Tensor]) -> None:
        """Add a batch to the means."""
        self.test_means.update(self._evaluate(batch)[1])

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self._log_means("test", self.test_means)

    def predict_step(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the outputs of a batch, with or without its targets."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums of the training epoch so far, a row a rank, and `diverged`."""
        rows = self.all_gather(self.train_means.sums)
        checkpoint["diverged"] = self.diverged
        checkpoint["losses_finite"] = (
            None if self._finite is None else self._finite.cpu()
        )
        checkpoint["train_means"] = torch.as_tensor(rows).reshape(-1, 3).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums, and be as healthy as the run was."""
        rows = checkpoint.get("train_means")
        if rows is not None and self._trainer is not None:
            trainer = self.trainer
            if trainer.state.fn == TrainerFn.FITTING:
                self._had_diverged = checkpoint.get("diverged", False)
                self._finite = checkpoint.get("losses_finite")
            self.train_means.restore(rows, trainer.global_rank, trainer.world_size)

    def _evaluate(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a batch's losses and its sums: loss, right answers, examples."""
        x, target = batch[0], batch[1]
        output = self(x)
        losses = self.losses(output, target)
        label = target.argmax(1) if target.is_floating_point() else target
        correct = (output.argmax(1) == label).sum()
        total = losses.detach().sum(dtype=SUM_DTYPE)
        sums = torch.stack([total, correct.to(total), total.new_tensor(len(losses))])
        return losses, sums

    def _log_epoch(self, name: str, value: Tensor) -> None:
        """Log a value that all ranks have alike."""
        # The maximum of equal values is exact for any number of ranks; a mean isn't.
        self.log(name, value, sync_dist=True, reduce_fx="max", batch_size=1)

    def _log_means(self, stage: str, means: EpochMeans) -> Tensor:
        """Log loss and accuracy of a stage; return the loss."""
        values = means.compute()
        for name, value in values.items():
            self._log_epoch(f"{stage}/{name}", value)
        return values["loss"]

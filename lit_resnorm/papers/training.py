"""Training for items: full-batch fits of the project's modules, quietly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_resnorm.data import DataModule
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.modules import LitClassifier

__all__ = ["LossCurves", "device", "examples", "fit_full_batch", "quiet"]


def device(settings: Mapping[str, Any]) -> torch.device:
    """Return where the nets of these settings run.

    `settings["device"]` is `cpu`, or `auto` for a CUDA GPU where there is one.
    """
    on_gpu = settings["device"] == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def examples(data: DataModule, split: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a whole split.

    Args:
        data: A data module whose sets are in memory.
        split: `train`, `val` or `test`.
    """
    data.prepare_data()
    data.setup()
    chosen = getattr(data, f"{split}_set")
    return chosen.x, chosen.y


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's greetings and its advice about loaders off the terminal.

    That a training diverged is left to the items, which count where it is meant to.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message="the training loss at step")
            yield
    finally:
        logger.setLevel(level)


def fit_full_batch(
    module: L.LightningModule,
    x: Tensor,
    y: Tensor,
    num_steps: int,
    *,
    callbacks: Sequence[Callback] = (),
    precision: Any = "32-true",
    accelerator: str = "cpu",
) -> None:
    """Train a module for a number of steps on one batch.

    Args:
        module: What is trained.
        x: All inputs.
        y: All targets.
        num_steps: Optimizer steps; fewer where the training diverges.
        callbacks: Callbacks of the Trainer.
        precision: As of the Trainer.
        accelerator: As of the Trainer.
    """
    with quiet():
        trainer = L.Trainer(
            max_epochs=1,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(_Repeated((x, y), num_steps), batch_size=None))


class _Repeated(Dataset[tuple[Tensor, Tensor]]):
    """One batch, so many times."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch


class LossCurves(Callback):
    """Notes training losses, and test losses in eval mode, along a fit.

    Args:
        x_test: Test inputs; None: only training losses are noted.
        y_test: Test targets.
        every: Steps between notes.

    Attributes:
        rows: `step`, `train` and, where asked for, `test`: mean losses of the weights
            after so many steps, the training loss as the step saw it (train mode).
    """

    def __init__(
        self,
        x_test: Tensor | None = None,
        y_test: Tensor | None = None,
        *,
        every: int = 1,
    ) -> None:
        self.x_test, self.y_test, self.every = x_test, y_test, every
        self.rows: list[dict[str, float]] = []
        self._test: float | None = None

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Evaluate the weights that the coming step sees."""
        del batch, batch_idx
        if self.x_test is not None and trainer.global_step % self.every == 0:
            self._test = self._evaluate(pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the loss that the step saw."""
        del pl_module, batch, batch_idx
        step = trainer.global_step - 1
        if step % self.every:
            return
        row = {"step": step, "train": float(outputs["loss"])}
        self.rows.append(row if self._test is None else {**row, "test": self._test})

    def _evaluate(self, module: L.LightningModule) -> float:
        if self.x_test is None or self.y_test is None:
            raise TypeError("test losses need test inputs and targets")
        if not isinstance(module, LitClassifier):
            raise TypeError(f"a LitClassifier is needed; got {type(module).__name__}")
        x, y = self.x_test.to(module.device), self.y_test.to(module.device)
        with untouched(module, norm_mode="eval") as run, torch.no_grad():
            return float(module.losses(run(lambda: module(x)), y).mean())

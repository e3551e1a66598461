"""What a command leaves behind where it is refused: nothing."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_resnorm.errors import WRONG_USE


@dataclass(frozen=True)
class Before:
    """What there was before a run directory was made.

    Attributes:
        runs: Names in the experiment's folder.
        missing: Folders that weren't there, the innermost first.
    """

    runs: frozenset[str]
    missing: tuple[Path, ...]

    def restore(self, run: Path | None) -> None:
        """Take away a new run's directory, and the folders that were made for it.

        Args:
            run: The run's directory; None: none was made.
        """
        if run is not None and run.name not in self.runs and run.is_dir():
            _close_wandb(run)
            shutil.rmtree(run)
        for folder in self.missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def look_before(folder: Path) -> Before:
    """Return what there is before a run is made in an experiment's folder.

    Args:
        folder: The experiment's folder, which need not be there.
    """
    runs = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return Before(frozenset(runs), tuple(missing))


def _close_wandb(run: Path) -> None:
    """End the W&B run that writes into a directory."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    if Path(wandb.run.dir).resolve().is_relative_to(run.resolve()):
        wandb.finish(exit_code=WRONG_USE)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the list of a Trainer's callbacks, to change in place."""
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


class Beginning(Callback):
    """Notes that a run has begun: its first batch is about to be run.

    The validation batches that a fit tries before it begins don't count.

    Attributes:
        begun: Whether it has.
    """

    def __init__(self) -> None:
        self.begun = False

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.begun = True

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Note it, unless a fit is about to begin."""
        self.begun |= trainer.state.fn != TrainerFn.FITTING

    def on_test_batch_start(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.begun = True

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.begun = True

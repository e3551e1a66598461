"""Where probes of a script without a logger write to."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from lit_resnorm.runs import RunHistory


class ScriptHistory(Callback):
    """Gives the probes of a script that has no logger a run directory of ours.

    The script's own values stay where it puts them, and so do its checkpoints: the
    Trainer isn't given a logger. At the end the directory is named.

    Attributes:
        probe_loggers: Loggers that probes write to beside the Trainer's.
    """

    def __init__(self) -> None:
        self.probe_loggers: list[Logger] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a new directory."""
        del stage
        if trainer.loggers or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(trainer.default_root_dir) / "runs" / "unedited"
        path = trainer.strategy.broadcast(_free(folder / stamp))
        history = RunHistory(path)
        history.log_graph(pl_module)
        self.probe_loggers = [history]

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Name the directory."""
        del pl_module, stage
        self._end(trainer, "success")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the directory."""
        del pl_module, exception
        self._end(trainer, "failed")

    def _end(self, trainer: Trainer, status: str) -> None:
        while self.probe_loggers:
            history: Any = self.probe_loggers.pop()
            history.finalize(status)
            if trainer.is_global_zero:
                print(f"probes wrote {history.path}", file=sys.stderr)  # noqa: T201


def _free(path: Path) -> Path:
    """Return a path at which there is nothing: this one, or one beside it."""
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free

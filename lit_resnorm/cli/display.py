"""What the command line shows of a run: its network, and how far it has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
)
from rich import get_console
from rich.table import Table

from lit_resnorm.cli.traces import callbacks_of

_SECONDS_BETWEEN_LINES = 10.0
"""Time between two lines where no bar can be shown."""


def suit_output(trainer: Trainer) -> None:
    """Replace Lightning's summary, and its bar where there is no terminal.

    What a project has derived from them stays.

    Args:
        trainer: Its callbacks are replaced.
    """
    callbacks = callbacks_of(trainer)
    terminal = get_console().is_terminal
    for place, callback in enumerate(callbacks):
        if type(callback) in (ModelSummary, RichModelSummary):
            depth = cast(ModelSummary, callback)._max_depth
            callbacks[place] = Summary(max_depth=depth)
        elif type(callback) is RichProgressBar and not terminal:
            callbacks[place] = ProgressLines()


class Summary(ModelSummary):
    """The layers and their parameters, without operations that weren't counted."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print them.

        Args:
            summary_data: Columns: their titles and their cells.
            total_parameters: Number of all parameters.
            trainable_parameters: Number of those that are trained.
        """
        columns = [
            (title, cells)
            for title, cells in summary_data
            if title not in ("FLOPs", "Mode")
        ]
        table = Table(box=None, pad_edge=False)
        for title, _cells in columns:
            table.add_column(title.strip(), justify=_side(title), no_wrap=True)
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*row)
        console = get_console()
        console.print(table)
        fixed = total_parameters - trainable_parameters
        console.print(f"{total_parameters:,} parameters, {fixed:,} of them not trained")


def _side(title: str) -> Any:
    return "right" if "Params" in title else "left"


class ProgressLines(ProgressBar):
    """How far a run has come, in a line now and then: for files, which keep all."""

    def __init__(self) -> None:
        super().__init__()
        self._began = self._said = 0.0
        self._epoch = 0
        self._enabled = True

    def disable(self) -> None:
        """Say nothing, as on all ranks but one."""
        self._enabled = False

    def enable(self) -> None:
        """Say it again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._began = self._said = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Say where the epoch is, if nothing was said for a while."""
        self._epoch = trainer.current_epoch + 1
        if time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._say(trainer, f", batch {done} of {self.total_train_batches}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the training came to."""
        del pl_module
        self._say(trainer, " done")

    def _say(self, trainer: Trainer, where: str) -> None:
        self._said = time.monotonic()
        if not self._enabled:
            return
        of = f" of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        values = self.get_metrics(trainer, trainer.lightning_module)
        said = "".join(
            f", {name} {value:.4g}"
            for name, value in values.items()
            if isinstance(value, float)  # no v_num, which is the run's name
        )
        line = f"epoch {self._epoch}{of}{where}, step {trainer.global_step}{said}"
        sys.stdout.write(f"{line}, {self._said - self._began:.0f} s\n")
        sys.stdout.flush()


class StageLines:
    """How far the stages of a command have come, in a line now and then: for files.

    Args:
        write: Takes a line; default: standard error.
        clock: Returns seconds.
    """

    def __init__(
        self,
        write: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = sys.stderr.write if write is None else write
        self._clock = clock
        self._began = self._said = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say it, if nothing was said for a while."""
        now = self._clock()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        how_far = f", {done} of {total}" if total > 1 else ""
        self._write(f"{stage}{how_far}, {now - self._began:.0f} s\n")

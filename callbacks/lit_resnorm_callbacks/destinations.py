"""Sending what a probe measured to every logger, whatever each can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_resnorm_callbacks.records import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


@runtime_checkable
class TakesTables(Protocol):
    """A logger that takes tables, as Weights & Biases' does."""

    def log_table(
        self, key: str, *, columns: list[str], data: list[list[Any]], step: int
    ) -> None:
        """Log one table."""


@runtime_checkable
class TakesImages(Protocol):
    """A logger that takes images, as Weights & Biases' does."""

    def log_image(self, key: str, images: list[Any], step: int | None) -> None:
        """Log images, which may be figures."""


def send_values(
    trainer: Trainer, step: int, values: dict[str, float], tables: Mapping[str, Table]
) -> None:
    """Log values as of an optimizer step, with one row a logger, and tables.

    The values also land in `trainer.callback_metrics`, where `EarlyStopping` and
    `ModelCheckpoint` look.
    """
    trainer.callback_metrics.update(
        {key: torch.tensor(value) for key, value in values.items()}
    )
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)
        if isinstance(logger, TakesTables):
            for key, (columns, data) in tables.items():
                logger.log_table(key, columns=columns, data=data, step=step)


def send_figures(
    trainer: Trainer, step: int | None, figures: Mapping[str, Figure]
) -> None:
    """Log figures to the loggers that take images or figures."""
    for key, figure in figures.items():
        image = None
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if isinstance(logger, TakesImages):
                image = image or _drawn(figure)  # drawn once for all of them
                logger.log_image(key, images=[image], step=step)
            elif (add_figure := getattr(experiment, "add_figure", None)) is not None:
                add_figure(key, figure, global_step=step)


def _drawn(figure: Figure) -> Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()))


def to_host(
    values: dict[str, Tensor],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the scalars, and the 1-d series, as numbers, moved in one transfer."""
    if not values:
        return {}, {}
    flat = torch.cat([value.detach().double().flatten() for value in values.values()])
    host = flat.cpu().split([value.numel() for value in values.values()])
    numbers: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for (key, value), part in zip(values.items(), host, strict=True):
        if value.ndim:
            series[key] = part.tolist()
        else:
            numbers[key] = part.item()
    return numbers, series

"""Sending what a probe measured to every logger, whatever each can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_resnorm_callbacks.records import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    for logger in trainer.loggers:
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        for key, figure in figures.items():
            if isinstance(logger, TakesImages):
                logger.log_image(key, images=[figure], step=step)
            elif add_figure is not None:
                add_figure(key, figure, global_step=step)


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

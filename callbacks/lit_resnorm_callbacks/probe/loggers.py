"""Sending what a probe measured to every logger, whatever each can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import Tensor

from lit_resnorm.quantities import Declared, find_declared
from lit_resnorm_callbacks.probe.records import DepthCurves, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_LINES = 8
"""Steps that a chart shows at most."""


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


Survive = Callable[[str], AbstractContextManager[None]]
"""Lets what fails inside not end the run; takes what it is, for a message."""


@runtime_checkable
class TakesQuantities(Protocol):
    """A logger that keeps what its values are, as `RunHistory` does."""

    def log_quantities(self, quantities: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what is declared, by key."""


@runtime_checkable
class Declares(Protocol):
    """A callback that says what it logs, as every probe does."""

    def declared(self) -> dict[str, Declared]:
        """Return what it logs, by key."""
        ...


def send_quantities(
    trainer: Trainer, own: Mapping[str, Declared], survive: Survive
) -> None:
    """Tell the loggers what the probes' values are: titles, units, scales, words.

    Where a logger has no place of its own for that, it goes into what Weights & Biases
    and `CSVLogger` keep as config, under `quantities`; that replaces what stood there,
    so that all probes of the Trainer are sent together.

    Args:
        trainer: With the other probes among its callbacks.
        own: What the asking probe declares, which may stand outside of the Trainer.
        survive: Lets a logger's failure not end the run.
    """
    declared: dict[str, Declared] = {}
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, Declares):
            declared |= callback.declared()
    declared |= own
    rows = {key: one.row() for key, one in declared.items()}
    for logger in trainer.loggers:
        with survive(f"{type(logger).__name__} of quantities"):
            if isinstance(logger, TakesQuantities):
                logger.log_quantities(rows)
            elif isinstance(logger, WandbLogger | CSVLogger):
                logger.log_hyperparams({"quantities": rows})


def send_values(
    trainer: Trainer,
    step: int,
    values: dict[str, float],
    tables: Mapping[str, Table],
    spectra: Mapping[str, Sequence[float]],
    survive: Survive,
) -> None:
    """Log values as of an optimizer step, with one row a logger, tables and spectra.

    The values also land in `trainer.callback_metrics`, where `EarlyStopping` and
    `ModelCheckpoint` look. Of a spectrum, Weights & Biases and TensorBoard get a
    histogram of log10 of what is positive, `histograms/<key>_log10`.
    """
    trainer.callback_metrics.update(
        {key: torch.tensor(value) for key, value in values.items()}
    )
    for logger in trainer.loggers:
        place = type(logger).__name__
        with survive(f"{place}.log_metrics"):
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)
        if isinstance(logger, TakesTables):
            for key, (columns, data) in tables.items():
                with survive(f"{place}.log_table"):
                    logger.log_table(key, columns=columns, data=data, step=step)
        for key, spectrum in spectra.items():
            with survive(f"{place}'s histogram"):
                _send_histogram(logger, f"histograms/{key}_log10", spectrum, step)


def _send_histogram(
    logger: Logger, key: str, spectrum: Sequence[float], step: int
) -> None:
    values = np.asarray(spectrum)
    values = np.log10(values[(values > 0) & np.isfinite(values)])
    if not len(values):
        return
    experiment = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({key: wandb.Histogram(values.tolist())}, step=step)  # pyright: ignore[reportArgumentType]
    elif (add_histogram := getattr(experiment, "add_histogram", None)) is not None:
        add_histogram(key, values, global_step=step)


def send_figures(
    trainer: Trainer,
    step: int | None,
    figures: Mapping[str, Figure],
    survive: Survive,
) -> None:
    """Log figures to the loggers that take images or figures.

    In Weights & Biases they are `figures/<key>`: a key holds one kind of thing there,
    and `fim/lambda_max` is a number.
    """
    for key, figure in figures.items():
        with survive(f"figure {key}"):
            image = _drawn(figure)  # drawn once for all of them
            for logger in trainer.loggers:
                with survive(f"{type(logger).__name__}'s figure {key}"):
                    _send_figure(logger, key, figure, image, step)


def _send_figure(
    logger: Logger, key: str, figure: Figure, image: Image, step: int | None
) -> None:
    experiment = getattr(logger, "experiment", None)
    if isinstance(logger, TakesImages):
        place = f"figures/{key}" if isinstance(logger, WandbLogger) else key
        logger.log_image(place, images=[image], step=step)
    elif (add_figure := getattr(experiment, "add_figure", None)) is not None:
        add_figure(key, figure, global_step=step)


def send_charts(
    trainer: Trainer,
    step: int | None,
    curves: Mapping[str, DepthCurves],
    declared: Mapping[str, Declared],
    survive: Survive,
) -> None:
    """Log quantities by depth as charts of Weights & Biases: `charts/<key>`.

    Across is the place of the site in the order of execution; a line is a step, of at
    most eight.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        with survive(f"{type(logger).__name__}'s charts"):
            if charts := _charts(curves, declared):
                logger.log_metrics(charts, step=step)


def _charts(
    curves: Mapping[str, DepthCurves], declared: Mapping[str, Declared]
) -> dict[str, Any]:
    import wandb

    charts: dict[str, Any] = {}
    for key, (sites, by_step) in curves.items():
        steps = sorted(by_step)
        steps = steps[:: -(-len(steps) // _LINES)] if steps else []
        one = find_declared(declared, key, by_site=True)
        charts[f"charts/{key}"] = wandb.plot.line_series(
            xs=range(len(sites)),
            ys=[by_step[step] for step in steps],
            keys=[f"step {step}" for step in steps],
            title=one.quantity.label if one else key,
            xname="site, in the order of execution",
        )
    return charts


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

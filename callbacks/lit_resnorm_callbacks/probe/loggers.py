"""Sending what a probe measured to every logger, whatever each can take."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

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


def loggers_of(trainer: Trainer) -> list[Logger]:
    """Return the loggers that probes write to: the Trainer's, and those for probes.

    A callback with `probe_loggers` gives the latter, in scripts that have no logger.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    own = (logger for c in callbacks for logger in getattr(c, "probe_loggers", ()))
    return [*trainer.loggers, *own]


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
    for logger in loggers_of(trainer):
        with survive(f"{type(logger).__name__} of quantities"):
            if isinstance(logger, TakesQuantities):
                logger.log_quantities(rows)
            elif isinstance(logger, WandbLogger | CSVLogger):
                logger.log_hyperparams({"quantities": rows})


def send_values(
    trainer: Trainer, step: int, values: Mapping[str, float], survive: Survive
) -> None:
    """Log scalars as of an optimizer step, one row a logger."""
    for logger in loggers_of(trainer):
        with survive(f"{type(logger).__name__}.log_metrics"):
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)


def send_tables(
    trainer: Trainer, step: int, tables: Mapping[str, Table], survive: Survive
) -> None:
    """Log tables as of an optimizer step.

    A logger that takes none, and has a folder of its own, gets files in it:
    `tables/<key>.csv`, with the step as first column.
    """
    for logger in loggers_of(trainer):
        place = type(logger).__name__
        for key, (columns, data) in tables.items():
            with survive(f"{place}'s table {key}"):
                if isinstance(logger, TakesTables):
                    logger.log_table(key, columns=columns, data=data, step=step)
                elif trainer.is_global_zero and (folder := logger.log_dir):
                    path = Path(folder) / "tables" / f"{key}.csv"
                    _append_csv(logger, path, step, columns, data)


def send_histograms(
    trainer: Trainer,
    step: int,
    spectra: Mapping[str, Sequence[float]],
    survive: Survive,
    *,
    always: bool,
) -> None:
    """Log of each spectrum a histogram of log10 of what is positive.

    TensorBoard gets them, as `histograms/<key>_log10`, and Weights & Biases.

    Args:
        trainer: With the loggers.
        step: Optimizer steps.
        spectra: The spectra.
        survive: Lets a logger's failure not end the run.
        always: Whether Weights & Biases gets one, which has the spectrum as a table.
    """
    for logger in loggers_of(trainer):
        if isinstance(logger, WandbLogger) and not always:
            continue
        for key, spectrum in spectra.items():
            with survive(f"{type(logger).__name__}'s histogram"):
                _send_histogram(logger, f"histograms/{key}_log10", spectrum, step)


_BEGUN: WeakKeyDictionary[Logger, dict[Path, list[str]]] = WeakKeyDictionary()
"""Files that this process has begun, by logger, and their columns.

What lay there before is replaced, as `CSVLogger` replaces its own file.
"""


def _append_csv(
    logger: Logger,
    path: Path,
    step: int,
    columns: Sequence[str],
    data: Sequence[Sequence[Any]],
) -> None:
    begun = _BEGUN.setdefault(logger, {})
    names = ["step", *columns]
    rows = [dict(zip(names, [step, *row], strict=True)) for row in data]
    known = begun.get(path)
    if known != names:
        path.parent.mkdir(parents=True, exist_ok=True)
        if known is not None:  # a quantity that was not measured before
            with path.open(encoding="utf-8", newline="") as file:
                rows = [*csv.DictReader(file), *rows]
    with path.open(
        "a" if known == names else "w", encoding="utf-8", newline=""
    ) as file:
        writer = csv.DictWriter(file, names, restval="")
        if known != names:
            writer.writeheader()
        writer.writerows(rows)
    begun[path] = names


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


def whose(trainer: Trainer) -> str:
    """Return the model's name, and the run's where a logger keeps one."""
    names = [type(trainer.lightning_module).__name__]
    for logger in trainer.loggers:
        # a run directory has no name but its path's, and W&B's name is the project's
        folder = logger.log_dir or logger.save_dir
        if folder and not isinstance(logger, WandbLogger):
            names.append("/".join(Path(folder).absolute().parts[-2:]))
            break
    return ", ".join(names)


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
            for logger in loggers_of(trainer):
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
    for logger in loggers_of(trainer):
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

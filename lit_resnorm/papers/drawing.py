"""How the papers' figures look: variants told apart in colour and in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = ["STYLES", "Look", "legend", "measured", "panels", "plain_ticks", "theory"]


class Look(NamedTuple):
    """Colour, marker and dashes of a variant, and its name in legends."""

    colour: Any
    marker: str
    dashes: Any
    label: str


# Colours of Okabe & Ito, of differing lightness; markers and dashes differ as well.
STYLES = {
    "mlp": Look("#D55E00", "o", (0, (1, 1.2)), "MLP"),
    "res1": Look("#009E73", "s", (0, (5, 1.5, 1, 1.5)), "ResNet, one-layer skips"),
    "res2": Look("#0072B2", "^", (0, (5, 1.5)), "ResNet"),
    "res2_bn": Look("#000000", "D", (0, (8, 2)), "ResNet with BN"),
}


def panels(
    rows: int = 1, columns: int = 1, *, title: str, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        title: Title of the figure.
        size: Width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(alpha=0.25)
    return figure, axes


def measured(
    axes: Axes,
    x: Any,
    y: Any,
    look: Look,
    *,
    error: Any = None,
    line: bool = False,
    label: str | None = None,
    **options: Any,
) -> None:
    """Draw a measurement: open markers, with standard errors where given."""
    axes.errorbar(
        np.asarray(x),
        np.asarray(y),
        yerr=None if error is None else np.asarray(error),
        color=look.colour,
        marker=look.marker,
        markersize=5,
        markerfacecolor="white",
        linestyle=look.dashes if line else "none",
        linewidth=1.2,
        capsize=2,
        label=look.label if label is None else label,
        **options,
    )


def theory(
    axes: Axes, x: Any, y: Any, look: Look, label: str | None = None, **options: Any
) -> None:
    """Draw a theory: a line without markers, under the measurements."""
    axes.plot(
        np.asarray(x),
        np.asarray(y),
        color=look.colour,
        linestyle=look.dashes,
        linewidth=1.4,
        zorder=1,
        label=f"{look.label}, theory" if label is None else label,
        **options,
    )


def plain_ticks(axes: Axes) -> None:
    """Write the numbers of a log scale of few decades without powers."""
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """Put one legend for all axes under the figure, where it hides no curve."""
    entries: dict[str, Any] = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )

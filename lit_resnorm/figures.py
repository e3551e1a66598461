"""Figures of what runs measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_resnorm.quantities import AxisScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[int, tuple[Sequence[float], Sequence[float]]]
"""By optimizer step: where the values stand across, and the values."""

_THEORY: dict[str, Any] = {
    "color": "black",
    "linestyle": "--",
    "linewidth": 1.2,
    "label": "theory, random weights",
}


def by_depth(
    sites: Sequence[str],
    values: Mapping[int, Sequence[float]],
    *,
    quantity: str,
    title: str = "",
    theory: Sequence[float] = (),
    scale: AxisScale = "auto",
) -> Figure:
    """Return one picture of a quantity by depth: depth across, step as colour.

    Args:
        sites: Site names in the order of execution.
        values: By optimizer step, one value a site; NaN leaves a gap.
        quantity: Label of the vertical axis, with its unit.
        title: Title of the figure.
        theory: What random weights should give, one value a site.
        scale: Of the vertical axis; log only where there is a positive value.
    """
    places = range(len(sites))
    width = min(6.0 + 0.09 * len(sites), 14.0)
    figure, axes = _by_step(
        {step: (places, column) for step, column in values.items()}, width, marker="o"
    )
    if theory:
        axes.plot(places, theory, **_THEORY)
        axes.legend(fontsize=7)
    stride = max(1, -(-len(sites) // 40))
    axes.set_xticks(
        places[::stride], sites[::stride], rotation=60, ha="right", fontsize=7
    )
    axes.set(xlabel="site, in the order of execution", ylabel=quantity, title=title)
    finite = [v for column in values.values() for v in column if math.isfinite(v)]
    # Matplotlib's margins around larger values than that overflow.
    if scale == "log" and 0 < max(finite, default=0.0) < 1e200:
        axes.set_yscale("log")
    return figure


def spectrum(
    values: Mapping[int, Sequence[float]], *, quantity: str, title: str = ""
) -> Figure:
    """Return one picture of ranked values: rank across, both axes log, step as colour.

    Args:
        values: By optimizer step, values in descending order; those that are not
            positive are left out.
        quantity: Label of the vertical axis, with its unit.
        title: Title of the figure.
    """
    ranked = {
        step: [value for value in column if value > 0]
        for step, column in values.items()
    }
    figure, axes = _by_step(
        {step: (range(1, len(r) + 1), r) for step, r in ranked.items()}, width=6.4
    )
    axes.set(xscale="log", yscale="log", xlabel="rank, largest first")
    axes.set(ylabel=quantity, title=title)
    return figure


def growth(
    curves: Mapping[int, Sequence[tuple[float, float]]],
    *,
    quantity: str,
    title: str = "",
    theory: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Return a positive quantity by depth twice: both axes log, and only its own.

    A power law is straight in the first, an exponential in the second; step as colour.

    Args:
        curves: By optimizer step, depth and value of each place.
        quantity: Label of the vertical axis, with its unit.
        title: Title of the figure.
        theory: What random weights should give, depth and value of each place.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    power, exponential = figure.subplots(1, 2, sharey=True)
    steps = sorted(curves)
    colours = colormaps["viridis"].reversed()
    for place, step in enumerate(steps):
        depth, value = zip(*curves[step], strict=True)
        shade = colours(0.2 + 0.8 * place / max(1, len(steps) - 1))
        for axes in (power, exponential):
            axes.plot(depth, value, color=shade, marker="o", markersize=3, label=step)
    power.set(xscale="log", yscale="log", ylabel=quantity)
    places = [depth for curve in curves.values() for depth, _ in curve]
    power.set_xticks(ticks := _depth_ticks(min(places), max(places)), map(str, ticks))
    # Less than a decade would get a label at every tick, one over the other.
    power.xaxis.set_minor_formatter(NullFormatter())
    exponential.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for axes in (power, exponential):
        axes.set(xlabel="layer")
        axes.grid(alpha=0.3)
    if theory:
        for axes in (power, exponential):
            axes.plot(*zip(*theory, strict=True), **_THEORY)
    if theory or 1 < len(steps) <= 12:
        exponential.legend(title="optimizer step", fontsize=7)
    figure.suptitle(title)
    return figure


def _depth_ticks(first: float, last: float) -> list[int]:
    """Return depths to label on a log axis: 1, 2, 3, 5, 10, ... between the ends."""
    powers = range(len(str(int(last))))
    known = [digit * 10**power for power in powers for digit in (1, 2, 3, 5)]
    within = [depth for depth in known if first <= depth <= last]
    if len(within) > 2:
        return within
    # Layers far from the input, or two or three of them.
    middle = round((first * last) ** 0.5)
    return sorted({math.ceil(first), middle, math.floor(last)})


def _by_step(
    curves: Curves, width: float, marker: str | None = None
) -> tuple[Figure, Axes]:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    # No pyplot: nothing global, nothing to close.
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted(curves)
    # The pale fifth of the map is left out: its lines are hard to see on white.
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    norm = Normalize(first - (last - first) / 4, last)
    colours = colormaps["viridis"].reversed()
    for step in steps:
        axes.plot(*curves[step], marker=marker, markersize=3, color=colours(norm(step)))
    axes.grid(alpha=0.3)
    if len(steps) > 1:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes)
        bar.ax.set_ylim(first, last)
        bar.set_label("optimizer step")
    return figure, axes

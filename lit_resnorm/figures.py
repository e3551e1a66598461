"""Figures of what runs measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_resnorm.quantities import AxisScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[int, tuple[Sequence[float], Sequence[float]]]
"""By optimizer step: where the values stand across, and the values."""

_MOST_STEPS = 8
"""Optimizer steps that a picture shows: more can't be told apart."""

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
    across: str = "site",
) -> Figure:
    """Return one picture of a quantity by depth: depth across, step as colour.

    Across is the number of the site; the axis names the first and the last. Of many
    steps eight are shown, the first and the last among them.

    Args:
        sites: Site names in the order of execution, of one kind.
        values: By optimizer step, one value a site; NaN leaves a gap.
        quantity: Label of the vertical axis, with its unit.
        title: Title of the figure.
        theory: What random weights should give, one value a site.
        scale: Of the vertical axis; log only where there is a positive value.
        across: What a site is: `residual addition`, `activation` ...
    """
    from matplotlib.ticker import MaxNLocator

    places = range(1, len(sites) + 1)
    figure, axes = _by_step(
        {step: (places, column) for step, column in values.items()}, marker="o"
    )
    if theory:
        axes.plot(places, theory, **_THEORY)
    _tell_steps(axes, len(values), also=bool(theory))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set(ylabel=quantity, title=title)
    ends = f"1: {sites[0]}, {len(sites)}: {sites[-1]}" if len(sites) > 1 else sites[0]
    axes.set_xlabel(f"{across}, in the order of execution\n({ends})")
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
        {step: (range(1, len(r) + 1), r) for step, r in ranked.items()}
    )
    _tell_steps(axes, len(values))
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
    steps = shown_steps(curves)
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
    _tell_steps(exponential, len(curves), also=bool(theory))
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


def captioned(figure: Figure, caption: str) -> None:
    """Put a second line below a figure's title: whose it is."""
    title = figure.get_suptitle()
    if title or len(figure.axes) != 1:
        figure.suptitle(f"{title}\n{caption}" if title else caption)
        return
    (axes,) = figure.axes
    axes.set_title("\n".join(filter(None, [axes.get_title(), caption])), fontsize=10)


def shown_steps(steps: Iterable[int]) -> list[int]:
    """Return at most eight of the steps, the first and the last among them."""
    ordered = sorted(steps)
    if len(ordered) <= _MOST_STEPS:
        return ordered
    last = len(ordered) - 1
    places = {round(k * last / (_MOST_STEPS - 1)) for k in range(_MOST_STEPS)}
    return [ordered[place] for place in sorted(places)]


def _by_step(curves: Curves, marker: str | None = None) -> tuple[Figure, Axes]:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # No pyplot: nothing global, nothing to close.
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    steps = shown_steps(curves)
    colours = colormaps["viridis"].reversed()
    for place, step in enumerate(steps):
        # The pale fifth of the map is left out: its lines are hard to see on white.
        shade = colours(0.2 + 0.8 * place / max(1, len(steps) - 1))
        axes.plot(*curves[step], marker=marker, markersize=3, color=shade, label=step)
    axes.grid(alpha=0.3)
    return figure, axes


def _tell_steps(axes: Axes, number: int, *, also: bool = False) -> None:
    """Say which line is of which step, of so many, and what else is drawn."""
    title = "optimizer step"
    if number > _MOST_STEPS:
        title += f" ({_MOST_STEPS} of {number})"
    if number or also:
        axes.legend(title=title, fontsize=7, title_fontsize=7)

"""Verdict and drawing of Figure 7."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_resnorm.papers.drawing import STYLES, legend, measured, panels, theory
from lit_resnorm.papers.item import Check, Settings, between, near
from lit_resnorm.papers.summaries import where

__all__ = ["VARIANTS", "checks", "figure", "fitted_growth"]

VARIANTS = ("mlp", "res2", "res2_bn")
WHOLE_OVER_MATRIX = {
    ("mlp", 2): 1.04,
    ("mlp", 4): 2.15,
    ("res2", 2): 1.61,
    ("res2", 4): 2.48,
    ("res2_bn", 2): 1.57,
    ("res2_bn", 4): 2.27,
}
"""Maximum of the whole averaged matrix over that of one weight matrix, as measured.

Over the closed form of the latter it is larger: 1.12, 2.52; 1.87, 2.93; 1.77, 2.56."""


def _statistics(curves: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard error over draws, by variant and depth."""
    drawn = where(curves, kind="realised").groupby(["variant", "depth"])
    return cast(pd.DataFrame, drawn[["mean", "max"]].agg(["mean", "sem"]))


def fitted_growth(depths: list[int], values: list[float]) -> dict[str, float]:
    """Return the exponent of a power law, and the doublings a block, fitted to logs."""
    logs = np.log(values)
    power = np.polyfit(np.log(depths), logs, 1)[0]
    doublings = np.polyfit(depths, logs, 1)[0] / math.log(2)
    return {"power": float(power), "doublings": float(doublings)}


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 7."""
    drawn = _statistics(curves)
    expected = where(curves, kind="theory").set_index(["variant", "depth"])
    found = []
    for variant in VARIANTS:
        for depth in settings["depths"]:
            row = drawn.loc[(variant, depth)]
            share = 0.03 if depth <= 5 else 0.10
            for name in ("mean", "max"):
                value = float(expected.loc[(variant, depth), name])
                error = 3 * float(row[name, "sem"]) / value
                found.append(
                    near(
                        f"{name} eigenvalue of {variant} at L={depth} "
                        f"({share:.0%} and 3 standard errors)",
                        float(row[name, "mean"]),
                        value,
                        share + error,
                        "D",
                        relative=True,
                    )
                )
    depths = list(settings["depths"])
    for variant in VARIANTS:
        means = [float(drawn.loc[(variant, d), ("mean", "mean")]) for d in depths]
        fitted = fitted_growth(depths, means)
        found.append(_growth_check(variant, fitted))
    return [*found, *_averaged_checks(curves)]


def _growth_check(variant: str, fitted: dict[str, float]) -> Check:
    name = f"growth of the mean eigenvalue of {variant}"
    if variant == "mlp":
        power = fitted["power"]
        return near(f"{name}: flat (power of L)", power, 0.0, 0.1, "A")
    if variant == "res2":
        doublings = fitted["doublings"]
        return near(f"{name}: exponential (doublings a block)", doublings, 1, 0.1, "A")
    power = fitted["power"]
    return between(f"{name}: sub-linear (power of L)", power, 0.1, 0.9, "A")


def _averaged_checks(curves: pd.DataFrame) -> list[Check]:
    averaged = where(curves, kind="averaged").set_index(["variant", "depth"])
    expected = where(curves, kind="theory").set_index(["variant", "depth"])
    found = []
    for variant, depth in averaged.index:
        row = averaged.loc[(variant, depth)]
        if variant != "res2_bn":  # the closed form has population variances
            found.append(
                near(
                    f"per-matrix maximum of averaged {variant} at L={depth} "
                    "(15% and 3 standard errors)",
                    float(row.matrix_max),
                    value := float(expected.loc[(variant, depth), "matrix_max"]),
                    0.15 * value + 3 * float(row.matrix_error),
                    "D",
                )
            )
        factor = WHOLE_OVER_MATRIX.get((variant, depth))
        if factor is not None:
            low, high = (
                float(row[k] / row.matrix_max) for k in ("full_low", "full_high")
            )
            found.append(
                Check(
                    "full over measured per-matrix maximum of averaged "
                    f"{variant} at L={depth} (bracket)",
                    f"holds {factor}",
                    f"{low:.3g} to {high:.3g}",
                    None,
                    low <= factor <= high,
                    "D",
                )
            )
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 7."""
    title = (
        f"Fisher eigenvalues at initialisation. a, b: D = {settings['width']}, "
        f"N = {settings['num_examples']}, {settings['draws']} draws;\n"
        f"c, d: weight-averaged, D = {settings['averaged_width']}; "
        "bars: standard error, in d a bracket"
    )
    drawing, axes = panels(2, 2, title=title, size=(9.6, 7.8))
    drawn = _statistics(curves)
    expected = where(curves, kind="theory").set_index("variant")
    averaged = where(curves, kind="averaged").set_index("variant")
    for variant in VARIANTS:
        look = STYLES[variant]
        part, rows = drawn.loc[variant], expected.loc[variant]
        for one, name in zip(axes[:2], ("mean", "max"), strict=True):
            theory(one, rows.depth, rows[name], look)
            points = part[name]
            measured(one, points.index, points["mean"], look, error=points["sem"])
        few = averaged.loc[variant]
        short = rows[rows.depth <= max(settings["averaged_depths"])]
        theory(axes[2], short.depth, short.matrix_max, look)
        measured(axes[2], few.depth, few.matrix_max, look, error=few.matrix_error)
        middle = (few.full_low + few.full_high) / 2
        half = (few.full_high - few.full_low) / 2
        measured(axes[3], few.depth, middle, look, error=half)
    titles = (
        "a  mean of all eigenvalues (realised)",
        "b  largest eigenvalue (realised)",
        "c  largest of one weight matrix, weight-averaged",
        "d  largest of all weights, weight-averaged",
    )
    for one, name in zip(axes, titles, strict=True):
        _label_axes(one, name)
    legend(drawing, axes)
    return drawing


def _label_axes(axes: Axes, title: str) -> None:
    axes.set(yscale="log", xlabel="number of blocks $L$", ylabel="eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)

"""Verdict and drawing of Figure 8."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lit_resnorm.papers.drawing import STYLES, legend, panels
from lit_resnorm.papers.item import Check, Settings, all_of, near
from lit_resnorm.papers.summaries import where

__all__ = ["VARIANTS", "boundaries", "checks", "figure"]

VARIANTS = ("mlp", "res2", "res2_bn")
TOO_LARGE = 1000.0


def boundaries(curves: pd.DataFrame) -> pd.DataFrame:
    """Return, by variant and depth, where training begins to diverge.

    The boundary is between the largest rate below every diverging one and the smallest
    that diverges, in the middle of their logs; mean of logs over draws.
    """
    rows = []
    for key, part in curves.groupby(["variant", "depth", "draw"]):
        variant, depth, draw = cast(tuple[str, int, int], key)
        ordered_rates = part.sort_values("rate")
        diverged = (ordered_rates.loss > TOO_LARGE).to_numpy()
        rates = ordered_rates.rate.to_numpy()
        first = int(diverged.argmax()) if diverged.any() else len(rates)
        # without a diverging rate the boundary lies beyond the grid
        lower = rates[max(first - 1, 0)]
        upper = rates[first] if first < len(rates) else rates[-1] * math.sqrt(2)
        rows.append(
            {
                "variant": variant,
                "depth": depth,
                "draw": draw,
                "log_rate": math.log(lower * upper) / 2,
                "in_bounds": math.log(upper / part.bound.iloc[0]),
            }
        )
    found = pd.DataFrame(rows).groupby(["variant", "depth"])
    means = cast(pd.DataFrame, found[["log_rate", "in_bounds"]].mean())
    return means.map(math.exp).rename(columns={"log_rate": "rate"})


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 8."""
    del settings
    below = curves[curves.rate < curves.bound * (1 - 1e-9)]
    found = [
        all_of(
            f"loss at most {TOO_LARGE:.0f} below the curve, {variant}, runs",
            "every run",
            int((part.loss <= TOO_LARGE).sum()),
            len(part),
            "A",
        )
        for variant, part in below.groupby("variant", sort=False)
    ]
    edge = boundaries(curves).rate
    depths = np.array(edge["res2"].index, dtype=float)
    scaled = np.log2(edge["res2"].to_numpy() * depths)
    found.append(
        near(
            "ResNet: slope of log2(boundary x L) by block",
            float(np.polyfit(depths, scaled, 1)[0]),
            -1.0,
            0.25,
            "D",
        )
    )
    depths = np.array(edge["res2_bn"].index, dtype=float)
    power = np.polyfit(np.log(depths), np.log(edge["res2_bn"].to_numpy()), 1)[0]
    name = "ResNet with BN: power of L of the boundary"
    found.append(near(name, float(power), -1.2, 0.3, "D"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 8."""
    drawing, axes = panels(
        1,
        3,
        title=f"Loss after {settings['num_steps']} steps of gradient descent "
        f"(width {settings['width']}, N = {settings['num_examples']}; white: above "
        f"{TOO_LARGE:.0f})",
        size=(11.0, 4.4),
    )
    shown = curves.loss.where(curves.loss <= TOO_LARGE)
    norm = LogNorm(max(float(shown.min()), 1e-6), float(shown.max()))
    image = None
    for one, variant in zip(axes, VARIANTS, strict=True):
        part = cast(pd.DataFrame, where(curves, variant=variant))
        image = _map(one, part, settings, norm)
        one.set_title(STYLES[variant].label, fontsize=10)
    if image is not None:
        drawing.colorbar(image, ax=axes, label="final loss (half squared error)")
    legend(drawing, axes)
    return drawing


def _map(
    axes: Axes, part: pd.DataFrame, settings: Settings, norm: LogNorm
) -> QuadMesh | None:
    depths = list(settings["depths"])
    image = None
    for place, depth in enumerate(depths):
        cells = where(part, depth=depth)
        cells = cells.assign(power=(np.log2(cells.rate / cells.bound) * 2).round())
        logs = cells.assign(log_rate=np.log(cells.rate)).groupby("power")
        rates = np.exp(logs.log_rate.mean().to_numpy())
        # a cell is white where any draw diverged
        losses = logs.loss.max().where(lambda loss: loss <= TOO_LARGE).to_numpy()
        edges = np.concatenate([rates[:1] * 2**-0.25, rates * 2**0.25])
        image = axes.pcolormesh(
            [place - 0.45, place + 0.45],
            edges,
            losses[:, None],
            norm=norm,
            cmap="viridis_r",
        )
    bound = np.exp(np.log(part.bound).groupby(part.depth).mean())
    axes.plot(
        range(len(depths)),
        bound[depths],
        color="black",
        marker="o",
        markerfacecolor="white",
        label=r"$\eta = 2 / \lambda_{\max}$ (measured)",
    )
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set(
        yscale="log", xlabel="number of blocks $L$", ylabel=r"learning rate $\eta$"
    )
    return image

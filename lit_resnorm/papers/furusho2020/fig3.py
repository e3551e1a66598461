"""The PL constant of linear nets at initialisation (Figure 3)."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels
from lit_resnorm.papers.furusho2020.linear import (
    LOG10,
    VARIANTS,
    linear_blocks,
    log_mu,
    regression,
)
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    cell_seed,
    grid,
    near,
    ordered,
)
from lit_resnorm.papers.summaries import where

__all__ = ["FIG3"]

# Medians of 5 draws at width 20, from the derivation of the theory.
MEDIANS_D20 = {
    (1.0, "res2"): -11.0,
    (1.0, "res1"): -21.0,
    (1.0, "mlp"): -28.0,
    (0.5, "res2"): -4.1,
    (0.5, "res1"): -6.1,
    (0.5, "mlp"): -34.0,
    (0.2, "res1"): -1.5,
    (0.2, "res2"): -3.7,
}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the PL constants of freshly drawn nets, by gain and variant."""
    rows = []
    key = cell_seed(seed, "linear", cell["seed"])
    x_ND, _ = regression(settings, key)
    for gain in settings["gains"]:
        for variant in VARIANTS:
            net = linear_blocks(variant, settings, gain, key)
            value = log_mu(variant, net, x_ND) / LOG10
            rows.append({"gain": gain, "variant": variant, "log10_mu": value})
    return rows


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 3."""
    medians = curves.groupby(["gain", "variant"]).log10_mu.median()
    checks = [
        ordered(
            f"log10 mu at gain {gain}",
            {name: medians[gain, name] for name in ("mlp", "res1", "res2")},
            "A" if gain == 1.0 else "D",
        )
        for gain in (0.5, 1.0)
    ]
    checks.append(
        ordered(
            "log10 mu at gain 0.2",
            {name: medians[0.2, name] for name in ("mlp", "res2", "res1")},
            "D",
        )
    )
    if settings["width"] == 20:
        for (gain, name), value in MEDIANS_D20.items():
            spread = where(curves, gain=gain, variant=name).log10_mu
            # the reference is a median of 5 draws, of error 1.25 sd / sqrt(5)
            error = 1.2533 * spread.std() * math.sqrt(1 / len(spread) + 1 / 5)
            checks.append(
                near(
                    f"median log10 mu of {name} at gain {gain} (4 standard errors)",
                    medians[gain, name],
                    value,
                    4 * error + 0.5 * 10 ** math.floor(math.log10(abs(value)) - 1),
                    "D",
                )
            )
    return checks


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 3."""
    title = (
        f"PL constant of linear nets of {settings['num_weights']} weight matrices, "
        f"width {settings['width']}"
    )
    drawing, axes = panels(title=title, size=(6.4, 4.8))
    for variant in VARIANTS:
        part = where(curves, variant=variant).groupby("gain").log10_mu
        middle = part.median()
        spread = [middle - part.quantile(0.25), part.quantile(0.75) - middle]
        look = STYLES[variant]
        measured(axes[0], middle.index, middle, look, error=spread, line=True)
    axes[0].axvline(1.0, color="0.6", lw=0.8)
    axes[0].text(1.01, axes[0].get_ylim()[0], " Xavier", va="bottom", color="0.4")
    axes[0].set(
        xlabel=r"gain $g$: weights of variance $g^2/D$",
        ylabel=r"$\log_{10}\mu$ at initialisation (median, quartiles)",
    )
    legend(drawing, axes)
    return drawing


FIG3 = Item(
    **said_of("furusho2020.fig3"),
    claim="At Xavier's scale the PL constant of the ResNet that skips two layers is "
    "larger than that of the one that skips one, and that larger than the MLP's, by "
    "many orders of magnitude.",
    differs="The constants are derived anew. The published axis isn't known; the gain "
    "is shown because the order of the two ResNets depends on it: at small weights one "
    "layer is the better skip.",
    scales={
        name: {
            "width": width,
            "num_weights": 10,
            "num_examples": num_examples,
            "gains": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2],
            "num_seeds": num_seeds,
        }
        for name, width, num_examples, num_seeds in (
            ("small", 20, 200, 25),
            ("full", 100, 1000, 100),
        )
    },
    cells=lambda settings: grid(seed=range(settings["num_seeds"])),
    run=run,
    checks=checks,
    figure=figure,
)

"""Activation rates before and after training (Figure 6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.measures.activation import activation_rates
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels
from lit_resnorm.papers.furusho2020.recipe import SCALES, VARIANTS, digits, net
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    between,
    cell_seed,
    grid,
    near,
    ordered,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.papers.training import fit_full_batch

__all__ = ["FIG6"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the rate of each hidden layer before and after one training."""
    key = cell_seed(seed, "digits", cell["draw"])
    x, y, _, _ = digits(settings, key)
    module = net(settings, cell["variant"], cell["draw"], seed)
    rows = []
    for when in ("before", "after"):
        if when == "after":
            fit_full_batch(module, x, y, settings["num_steps"])
        rates = activation_rates(module, x).values()
        rows += [
            {"when": when, "layer": layer, "rate": float(rate.rate)}
            for layer, rate in enumerate(rates, start=1)
        ]
    return rows


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 6."""
    del settings
    found = []
    after = {}
    for variant in VARIANTS:
        part = where(curves, variant=variant)
        before = curve(where(part, when="before"), "layer", "rate")
        after[variant] = curve(where(part, when="after"), "layer", "rate").mean
        furthest = int(np.abs(before.mean - 0.5).argmax())
        # one layer's units share the sign of a common mean, so rates scatter by seed
        width = 0.05 + 3 * float(before.error[furthest])
        name = (
            f"rate of {variant} before training, layer furthest from 0.5 "
            "(0.05 and 3 standard errors)"
        )
        found.append(near(name, float(before.mean[furthest]), 0.5, width, "D"))
    limits = {"mlp": (0.44, 0.62), "res2": (0.39, 0.56)}
    for variant, (low, high) in limits.items():
        rates = after[variant]
        for word, value in (("lowest", rates.min()), ("highest", rates.max())):
            name = f"rate of {variant} after training, {word} layer"
            found.append(between(name, value, low, high, "D"))
    upper = {v: float(after[v][len(after[v]) // 2 :].mean()) for v in VARIANTS}
    found.append(
        ordered(
            "rate of the upper half of layers after training",
            {name: upper[name] for name in ("res1", "res2", "mlp")},
            "D",
        )
    )
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 6."""
    drawing, axes = panels(
        1,
        2,
        title="Activation rates by layer (mean, standard error over "
        f"{settings['num_draws']} seeds)",
        size=(8.8, 4.3),
    )
    for one, when in zip(axes, ("before", "after"), strict=True):
        for variant in VARIANTS:
            part = where(curves, when=when, variant=variant)
            rates = curve(part, "layer", "rate")
            place = rates.x * (settings["num_weights"] / rates.x.max())
            look = STYLES[variant]
            measured(one, place, rates.mean, look, error=rates.error, line=True)
        one.axhline(0.5, color="0.5", lw=0.8)
        one.set(xlabel="place of the activation, in weight layers")
        one.set(ylabel="share of positive pre-activations", ylim=(0.2, 0.65))
        one.set_title(f"{when} training", fontsize=10)
    legend(drawing, axes)
    return drawing


FIG6 = Item(
    **said_of("furusho2020.fig6"),
    claim="The activation rate of each hidden layer, with which the generalisation "
    "bounds are evaluated, for the three nets.",
    differs="The published curves aren't known. The ranges of the checks are this "
    "project's, from a run of the same recipe (Figure 4's), widened by 0.05.",
    chosen="The ranges after training, and the order of the upper halves: so these "
    "checks ask that a run comes out again, at other seeds. The rate before training "
    "(0.5) is derived.",
    scales={
        "small": {**SCALES["small"], "num_draws": 5},
        "full": {**SCALES["full"], "num_draws": 10},
    },
    cells=lambda settings: grid(variant=VARIANTS, draw=range(settings["num_draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

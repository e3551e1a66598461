"""Loss curves of ten-layer ReLU nets (Figure 4)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, panels
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
    ordered,
)
from lit_resnorm.papers.summaries import band, curve, means, where
from lit_resnorm.papers.training import LossCurves, fit_full_batch

__all__ = ["FIG4"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return training and test losses along one training."""
    key = cell_seed(seed, "digits", cell["draw"])
    x, y, x_test, y_test = digits(settings, key)
    module = net(settings, cell["variant"], cell["draw"], seed)
    losses = LossCurves(x_test, y_test, every=settings["every"])
    fit_full_batch(module, x, y, settings["num_steps"] + 1, callbacks=[losses])
    return losses.rows


def _final(curves: pd.DataFrame, settings: Settings) -> dict[str, dict[str, float]]:
    """Return mean losses and gaps at the end, by quantity and variant."""
    last = where(curves, step=settings["num_steps"])
    last = last.assign(gap=last.test - last.train)
    return {name: means(last, "variant", name) for name in ("train", "test", "gap")}


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 4."""
    final = _final(curves, settings)
    found = [
        between(
            f"training loss of {variant} at the end (nats): fits",
            final["train"][variant],
            None,
            0.1,
            "A",
        )
        for variant in VARIANTS
    ]
    for variant in ("res1", "res2"):
        for name in ("test", "gap"):
            values = {key: final[name][key] for key in (variant, "mlp")}
            quantity = "test loss" if name == "test" else "generalisation gap"
            found.append(ordered(f"{quantity} at the end (nats)", values, "A"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 4."""
    drawing, axes = panels(
        1,
        2,
        title=f"Loss of nets of {settings['num_weights']} weight layers, "
        f"{settings['num_train']} training examples (mean, range over "
        f"{settings['num_draws']} seeds)",
        size=(8.8, 4.3),
    )
    for one, name in zip(axes, ("train", "test"), strict=True):
        for variant in VARIANTS:
            part = curve(where(curves, variant=variant), "step", name)
            band(one, part.x, part.mean, part.low, part.high, STYLES[variant])
        word = "training" if name == "train" else "test"
        one.set(yscale="log", xlabel="optimizer step")
        one.set_ylabel(f"{word} loss (cross entropy, nats)")
    legend(drawing, axes)
    return drawing


FIG4 = Item(
    **said_of("furusho2020.fig4"),
    claim="All nets fit the training set; those with skip connections reach a lower "
    "test loss and have a smaller generalisation gap.",
    differs="Data, width, rates and number of steps aren't known. small: 200 of the "
    "8 x 8 digits, full-batch gradient descent with momentum, rates that weren't "
    "tuned; full: 1000 examples of MNIST.",
    scales={
        "small": {**SCALES["small"], "num_draws": 5, "every": 5},
        "full": {**SCALES["full"], "num_draws": 10, "every": 10},
    },
    cells=lambda settings: grid(variant=VARIANTS, draw=range(settings["num_draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

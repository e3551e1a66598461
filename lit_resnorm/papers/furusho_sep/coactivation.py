"""Units that two examples both activate, by depth."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels, theory
from lit_resnorm.papers.furusho_sep.states import (
    SCALES,
    VARIANTS,
    of_variant,
    pair_rows,
)
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    grid,
    near,
    ordered,
)

__all__ = ["COACTIVATION"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return co-activations by hidden layer of one random net."""
    rows = pair_rows(settings, cell["variant"], cell["draw"], seed)
    names = (
        *("depth", "coactivation", "from_angle", "spread"),
        *("from_input", "recursion"),
    )
    return [{k: row[k] for k in names} for row in rows if "coactivation" in row]


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the formula."""
    del settings
    found, last = [], {}
    for variant in VARIANTS:
        mean = of_variant(curves, variant, "coactivation").mean
        expected = of_variant(curves, variant, "from_angle").mean
        furthest = int(np.abs(mean - expected).argmax())
        found.append(
            near(
                f"co-activation of {variant}, layer furthest from (1 - angle/pi)/2",
                float(mean[furthest]),
                float(expected[furthest]),
                0.01,
                "P",
            )
        )
        # The published recursion for batch norm is of inputs: see `differs`.
        name = "from_input" if variant == "res2_bn" else "coactivation"
        rising = of_variant(curves, variant, name).mean
        start = {"first layer": float(rising[0]), "last layer": float(rising[-1])}
        words = (
            "(1 - angle/pi)/2 at the input's angle"
            if name == "from_input"
            else ("co-activation")
        )
        found.append(ordered(f"{words} of {variant}", start, "P"))
        recursion = of_variant(curves, variant, "recursion").mean
        furthest = int(np.abs(mean - recursion).argmax())
        found.append(
            near(
                f"co-activation of {variant}, layer furthest from the recursion of the"
                " batch's own kernels",
                float(mean[furthest]),
                float(recursion[furthest]),
                0.02,
                "D",
            )
        )
        last[variant] = float(mean[-1])
    order = {name: last[name] for name in ("res2_bn", "res2", "mlp")}
    return [*found, ordered("co-activation in the last layer", order, "P")]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw co-activations by depth."""
    drawing, axes = panels(
        title=f"Units that two examples both activate (mean over pairs, "
        f"{settings['draws']} draws)",
        size=(6.8, 4.8),
    )
    for variant in VARIANTS:
        values = of_variant(curves, variant, "coactivation")
        expected = of_variant(curves, variant, "from_angle")
        look = STYLES[variant]
        label = rf"{look.label}, $(1 - \theta/\pi)/2$ at measured $\theta$ (paper)"
        theory(axes[0], expected.x + 1, expected.mean, look, label)
        own = of_variant(curves, variant, "recursion")
        axes[0].plot(own.x + 1, own.mean, color=look.colour, lw=0.8, alpha=0.6)
        if variant == "res2_bn":
            given = of_variant(curves, variant, "from_input")
            label = (
                "ResNet with BN, the same at the block's input (published recursion)"
            )
            axes[0].plot(given.x + 1, given.mean, "x", color="0.5", label=label)
        measured(axes[0], values.x + 1, values.mean, look, error=values.error)
    axes[0].set(xlabel="block", ylabel="share of units active for both")
    legend(drawing, axes, columns=2)
    return drawing


COACTIVATION = Item(
    **said_of("furusho_sep.coactivation"),
    claim="The share of units that two examples both activate is (1 - angle/pi)/2; it "
    "rises with depth, in MLPs more than in ResNets, with batch norm least.",
    differs="The angle is that of the pre-activations, which without norms is "
    "that of the layer's input in expectation. With batch norm it isn't: the published "
    "recursion has a population's variances and no centring, so that it speaks of the "
    "input's angle, and is judged there. A real batch takes the mean out of the "
    "pre-activations; angles of centred inputs stay near pi/2, and co-activation near "
    "1/4 at any depth: it doesn't rise. That is what the recursion of the batch's own "
    "kernels says (thin lines), which is judged beside it.",
    chosen="The claim that co-activation rises was first judged with batch norm too, "
    "where it failed.",
    scales=SCALES,
    cells=lambda settings: grid(variant=VARIANTS, draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

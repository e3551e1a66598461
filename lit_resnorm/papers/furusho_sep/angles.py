"""Angles between examples by depth."""

from __future__ import annotations

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
from lit_resnorm.theory import angles

__all__ = ["ANGLES"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return angles by depth of one random net."""
    rows = pair_rows(settings, cell["variant"], cell["draw"], seed)
    return [{"depth": row["depth"], "angle": row["angle"]} for row in rows]


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the recursion."""
    depth = settings["depth"]
    found, last = [], {}
    for variant in VARIANTS:
        mean = of_variant(curves, variant, "angle").mean
        path = angles(variant, float(mean[0]), depth)
        last[variant] = float(mean[depth])
        for at in (1, 3, depth):
            if variant == "res2_bn" and at == depth:
                continue
            found.append(
                near(
                    f"mean angle of {variant} after {at} blocks (radians)",
                    float(mean[at]),
                    float(path[at]),
                    0.04,
                    "P",
                    relative=True,
                )
            )
    start = float(of_variant(curves, "res2_bn", "angle").mean[0])
    published = float(angles("res2_bn", start, depth)[-1])
    found.append(
        near(
            f"res2_bn after {depth} blocks: measured over published recursion",
            last["res2_bn"] / published,
            1.305 / 1.193,
            0.04,
            "D",
        )
    )
    name = f"mean angle after {depth} blocks (radians)"
    return [*found, ordered(name, last, "P")]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw angles by depth."""
    drawing, axes = panels(
        title=f"Angle between two examples (mean over pairs, {settings['draws']} "
        "draws) and the published recursion",
        size=(6.8, 4.8),
    )
    for variant in VARIANTS:
        values = of_variant(curves, variant, "angle")
        path = angles(variant, float(values.mean[0]), settings["depth"])
        look = STYLES[variant]
        label = f"{look.label}, recursion (paper)"
        theory(axes[0], range(len(path)), path.tolist(), look, label)
        measured(axes[0], values.x, values.mean, look, error=values.error)
    axes[0].set(xlabel="blocks passed", ylabel="angle (radians)", ylim=(0, 1.65))
    legend(drawing, axes)
    return drawing


ANGLES = Item(
    **said_of("furusho_sep.angles"),
    claim="The angle between any two examples shrinks with depth by a recursion of its "
    "own for each variant: fastest in MLPs, slowest with batch norm.",
    differs="small: Gaussian inputs instead of whitened images. The published "
    "recursion for batch norm has population variances; a real batch removes the mean "
    "of ReLU outputs, so angles stay larger: about 9 % after 10 blocks: checked.",
    scales=SCALES,
    cells=lambda settings: grid(variant=VARIANTS, draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

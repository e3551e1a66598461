"""Excess loss between gradient and distance (Figure 2)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, panels
from lit_resnorm.papers.furusho2020.linear import (
    PLPath,
    classifier,
    linear_blocks,
    regression,
)
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    all_of,
    cell_seed,
    grid,
    ordered,
)
from lit_resnorm.papers.summaries import means, where
from lit_resnorm.papers.training import fit_full_batch
from lit_resnorm.theory import least_squares_loss

__all__ = ["FIG2"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return excess loss and its two bounds along one descent."""
    key = cell_seed(seed, "linear", cell["seed"])
    x_ND, y_ND = regression(settings, key)
    variant = cell["variant"]
    net = linear_blocks(variant, settings, settings["gain"], key)
    path = PLPath(variant, x_ND, keep_weights=True)
    module = classifier(net, "SGD", settings["lr"])
    num_steps = settings["num_steps"]
    fit_full_batch(module, x_ND, y_ND, num_steps, callbacks=[path], precision="64-true")
    infimum = float(least_squares_loss(x_ND.T, y_ND.T))
    end = torch.cat([p.detach().flatten() for p in module.parameters()])
    lowest = min(row["log10_mu"] for row in path.rows)
    rows = []
    for row, weights in zip(path.rows, path.weights, strict=True):
        distance = float((weights - end).square().sum())
        rows.append(
            {
                "step": row["step"],
                "excess": row["loss"] - infimum,
                "upper": row["squared_gradient"] / 2 / 10 ** row["log10_mu"],
                "lower": 10**lowest / 2 * distance,
                "log10_mu": row["log10_mu"],
            }
        )
    return rows


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 2."""
    del settings
    resolved = curves[curves.excess > 1e-12]
    checks = [
        all_of(
            "excess loss at most |grad|^2 / (2 mu), steps",
            "every step",
            int((resolved.excess <= resolved.upper).sum()),
            len(resolved),
            "D",
        ),
        all_of(
            "excess loss at least mu/2 of the squared distance, steps",
            "every step",
            int((resolved.lower <= resolved.excess).sum()),
            len(resolved),
            "D",
        ),
    ]
    last = where(curves, step=curves.step.max())
    end = means(last, "variant", "excess", median=True)
    checks.append(
        ordered(
            "excess loss at the last step: the smaller mu, the flatter",
            {name: end[name] for name in ("res2", "mlp")},
            "A",
        )
    )
    return checks


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 2."""
    drawing, axes = panels(
        1,
        2,
        title="The PL inequality along gradient descent of linear nets, "
        f"gain {settings['gain']}",
        size=(8.4, 4.4),
    )
    looks = STYLES["mlp"], STYLES["res2"], STYLES["res2_bn"]
    labels = (
        r"upper bound $\|\nabla L\|^2 / 2\mu$",
        r"lower bound $\frac{1}{2}\mu_{\min}\,$distance$^2$",
        r"excess loss $L - L^*$",
    )
    for one, variant in zip(axes, ("res2", "mlp"), strict=True):
        part = where(curves, variant=variant, seed=0)
        for name, look, label in zip(
            ("upper", "lower", "excess"), looks, labels, strict=True
        ):
            values = np.maximum(part[name], 1e-18)
            one.plot(part.step, values, color=look.colour, ls=look.dashes, label=label)
        first = float(np.asarray(part.log10_mu)[0])
        one.set(yscale="log", xlabel="gradient step", ylabel="loss (squared units)")
        one.set_title(
            rf"{STYLES[variant].label}: $\log_{{10}}\mu = {first:.1f}$ at the start"
        )
    legend(drawing, axes)
    return drawing


FIG2 = Item(
    **said_of("furusho2020.fig2"),
    claim="The excess loss lies below |grad|^2 / (2 mu) and above mu/2 times the "
    "squared distance to the solution; a smaller mu makes the landscape flatter.",
    differs="The figure is a sketch; here the three quantities are those of one "
    "gradient descent of a linear ResNet, and of a linear MLP. The upper bound has mu "
    "at the weights of the step, the lower one the smallest mu along the path and the "
    "distance to its end.",
    chosen="Gain, rate and steps, so that both nets descend far enough to be told "
    "apart; steps with an excess loss below 1e-12 aren't judged. The bounds that are "
    "checked hold at any settings.",
    scales={
        name: {
            "width": 20,
            "num_weights": 10,
            "num_examples": 200,
            "gain": 0.5,
            "num_seeds": num_seeds,
            "lr": 0.05,
            "num_steps": num_steps,
        }
        for name, num_seeds, num_steps in (("small", 2, 600), ("full", 10, 3000))
    },
    cells=lambda settings: grid(
        variant=["res2", "mlp"], seed=range(settings["num_seeds"])
    ),
    run=run,
    checks=checks,
    figure=figure,
)

"""Stability where it is exact: leave-one-out in ridge regression (Figure 1)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, panels
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
)

__all__ = ["FIG1", "leave_one_out_losses", "ridge"]


def ridge(x_ND: np.ndarray, y_N: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weights that minimise `|X w - y|^2 + penalty |w|^2`."""
    eye_DD = np.eye(x_ND.shape[1])
    return np.linalg.solve(x_ND.T @ x_ND + penalty * eye_DD, x_ND.T @ y_N)


def leave_one_out_losses(
    x_ND: np.ndarray, y_N: np.ndarray, penalty: float
) -> np.ndarray:
    r"""Return the loss of each example under the fit to all others, in closed form.

    .. math:: l(A(S^i); z_i) = \frac12 \left(\frac{e_i}{1 - h_{ii}}\right)^2

    e are the residuals of the whole fit and h the diagonal of
    `X (X^T X + penalty)^{-1} X^T`.
    """
    eye_DD = np.eye(x_ND.shape[1])
    hat_NN = x_ND @ np.linalg.solve(x_ND.T @ x_ND + penalty * eye_DD, x_ND.T)
    residual_N = y_N - hat_NN @ y_N
    return (residual_N / (1 - hat_NN.diagonal())) ** 2 / 2


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return leave-one-out and replace-one losses of a chunk of random tasks."""
    rows = []
    for draw in range(cell["first"], cell["first"] + settings["chunk"]):
        rng = np.random.default_rng(cell_seed(seed, "ridge", draw))
        rows.append({"draw": draw, **_one_task(settings, rng)})
    return rows


def _one_task(settings: Settings, rng: np.random.Generator) -> Row:
    num, dim = settings["num_examples"], settings["dim"]
    penalty, noise = settings["penalty"], settings["noise"]
    true_D = rng.standard_normal(dim) / math.sqrt(dim)
    x_ND = rng.standard_normal((num, dim))
    y_N = x_ND @ true_D + noise * rng.standard_normal(num)
    weights_D = ridge(x_ND, y_N, penalty)
    losses_N = (x_ND @ weights_D - y_N) ** 2 / 2
    closed_N = leave_one_out_losses(x_ND, y_N, penalty)
    retrained_N, replaced_N = np.empty(num), np.empty(num)
    fresh_ND = rng.standard_normal((num, dim))
    fresh_N = fresh_ND @ true_D + noise * rng.standard_normal(num)
    for i in range(num):
        rest = np.arange(num) != i
        removed_D = ridge(x_ND[rest], y_N[rest], penalty)
        retrained_N[i] = (x_ND[i] @ removed_D - y_N[i]) ** 2 / 2
        x_new, y_new = x_ND.copy(), y_N.copy()
        x_new[i], y_new[i] = fresh_ND[i], fresh_N[i]
        replaced_D = ridge(x_new, y_new, penalty)
        replaced_N[i] = (x_ND[i] @ replaced_D - y_N[i]) ** 2 / 2
    # of a fresh example, exactly, over its Gaussian law
    test_loss = (np.sum((weights_D - true_D) ** 2) + noise**2) / 2
    return {
        "closed_error": float(np.abs(closed_N - retrained_N).max()),
        "eps_point": float(np.abs(closed_N - losses_N).mean()),
        "replace_signed": float((replaced_N - losses_N).mean()),
        "gap": float(test_loss - losses_N.mean()),
    }


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 1."""
    del settings
    difference = curves.replace_signed - curves.gap
    error = float(difference.sem())
    return [
        between(
            "leave-one-out loss, closed form minus retrained, largest",
            float(curves.closed_error.max()),
            None,
            1e-9,
            "D",
        ),
        near(
            "signed replace-one stability minus generalisation gap (4 standard errors)",
            float(difference.mean()),
            0.0,
            4 * error,
            "P",
        ),
    ]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 1."""
    drawing, (sketch, plot) = panels(
        1, 2, title="Algorithmic stability", size=(9.6, 4.2)
    )
    _sketch(sketch)
    look = STYLES["res2"]
    plot.scatter(
        curves.gap,
        curves.replace_signed,
        s=12,
        facecolors="none",
        edgecolors=look.colour,
        marker=look.marker,
        linewidths=0.6,
        alpha=0.7,
        label="one task",
    )
    mean = curves[["gap", "replace_signed"]].mean()
    low = float(curves[["gap", "replace_signed"]].min().min())
    high = float(curves[["gap", "replace_signed"]].max().max())
    plot.plot([low, high], [low, high], color="0.5", lw=1, label="equal")
    plot.plot(
        mean.gap, mean.replace_signed, "k*", ms=13, mec="white", label="mean over tasks"
    )
    plot.set(
        xlabel="generalisation gap (loss)",
        ylabel="signed replace-one stability (loss)",
    )
    plot.set_title(
        f"ridge regression, N = {settings['num_examples']}, D = {settings['dim']}: "
        "equal in the mean",
        fontsize=10,
    )
    legend(drawing, [plot])
    return drawing


def _sketch(axes: Axes) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 6))
    axes.axis("off")
    for row, (name, removed) in enumerate((("S", False), ("S^i", True))):
        bottom = 3.7 - 2.6 * row
        axes.text(0.1, bottom + 0.4, f"${name}$", fontsize=14, va="center")
        labels = ["$z_1$", r"$\dots$", "$z_i$", r"$\dots$", "$z_N$"]
        for place, label in enumerate(labels):
            gone = removed and place == 2
            box = FancyBboxPatch(
                (1.2 + place, bottom),
                0.8,
                0.8,
                boxstyle="round,pad=0.02",
                facecolor="none" if gone else "0.9",
                edgecolor="0.4",
                linestyle=":" if gone else "-",
            )
            axes.add_patch(box)
            colour = "0.6" if gone else "black"
            middle = 1.6 + place
            axes.text(
                middle, bottom + 0.4, label, color=colour, ha="center", va="center"
            )
        arrow = {"arrowstyle": "->", "color": "0.3"}
        start, end = (6.3, bottom + 0.4), (7.4, bottom + 0.4)
        axes.annotate("", end, start, arrowprops=arrow)
        axes.text(7.5, bottom + 0.4, f"$A({name})$", fontsize=13, va="center")
    axes.text(
        0.1,
        0.2,
        r"stable: $\mathrm{E}\,|\ell(A(S);z_i) - \ell(A(S^i);z_i)| \leq \epsilon$",
        fontsize=11,
    )


FIG1 = Item(
    **said_of("furusho2020.fig1"),
    claim="An algorithm is stable if its loss changes little when one example is left "
    "out of the training set; the stable algorithm generalises.",
    differs="The figure is a sketch. The second panel is a demonstration on ridge "
    "regression, where the loss without an example has a closed form, and where the "
    "signed replace-one stability equals the generalisation gap in expectation "
    "(Bousquet & Elisseeff 2002).",
    scales={
        name: {
            "num_examples": 20,
            "dim": 5,
            "penalty": 0.5,
            "noise": 0.5,
            "draws": draws,
            "chunk": draws // 2,
        }
        for name, draws in (("small", 400), ("full", 10_000))
    },
    cells=lambda settings: grid(first=range(0, settings["draws"], settings["chunk"])),
    run=run,
    checks=checks,
    figure=figure,
)

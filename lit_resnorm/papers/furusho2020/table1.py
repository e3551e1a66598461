"""The PL constant bounds the PL ratio along training (Table 1)."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels
from lit_resnorm.papers.furusho2020.linear import (
    VARIANTS,
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
)
from lit_resnorm.papers.summaries import where
from lit_resnorm.papers.training import fit_full_batch
from lit_resnorm.theory import least_squares_loss, pl_ratio

__all__ = ["TABLE1"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return constant and ratio at every noted step of one training."""
    key = cell_seed(seed, "linear", cell["seed"])
    x_ND, y_ND = regression(settings, key)
    net = linear_blocks(cell["variant"], settings, cell["gain"], key)
    path = PLPath(cell["variant"], x_ND)
    fit_full_batch(
        classifier(net, "Adam", settings["lr"]),
        x_ND,
        y_ND,
        settings["num_steps"],
        callbacks=[path],
        precision="64-true",
    )
    infimum = float(least_squares_loss(x_ND.T, y_ND.T))
    rows = []
    for row in path.rows:
        rho = pl_ratio(row["squared_gradient"], row["loss"], infimum)
        rows.append(
            {
                "step": row["step"],
                "excess": row["loss"] - infimum,
                "log10_mu": row["log10_mu"],
                "log10_rho": math.log10(rho) if rho > 0 else -math.inf,
            }
        )
    return rows


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Table 1."""
    del settings
    # below, the loss minus its infimum is rounding
    resolved = curves[curves.excess > 1e-12]
    return [
        all_of(
            f"mu <= rho of {variant}, steps",
            "every step",
            int((part.log10_mu <= part.log10_rho).sum()),
            len(part),
            "D",
        )
        for variant, part in resolved.groupby("variant", sort=False)
    ]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Table 1."""
    gains = settings["gains"]
    drawing, axes = panels(
        1,
        len(gains),
        title="PL constant (theory) and PL ratio (measured) along training",
        size=(4.2 * len(gains), 4.4),
    )
    for one, gain in zip(axes, gains, strict=True):
        for variant in VARIANTS:
            part = where(curves, gain=gain, variant=variant)
            middle = part.groupby("step")[["log10_mu", "log10_rho"]].median()
            look = STYLES[variant]
            one.plot(
                middle.index,
                middle.log10_mu,
                color=look.colour,
                ls=look.dashes,
                label=rf"{look.label}, $\mu$ (theory)",
            )
            every = middle.iloc[:: max(1, len(middle) // 12)]
            measured(
                one,
                every.index,
                every.log10_rho,
                look,
                label=rf"{look.label}, $\rho$ (measured)",
            )
        one.set(xlabel="optimizer step", ylabel=r"$\log_{10}$ (median over seeds)")
        one.set_title(f"gain {gain}")
    legend(drawing, axes)
    return drawing


TABLE1 = Item(
    **said_of("furusho2020.table1"),
    claim="Each variant has a PL constant mu, given by the singular values of its "
    "weights; the squared gradient is at least 2 mu times the excess loss.",
    differs="The literal formulas of the table aren't known; those of "
    "lit_resnorm.theory.log_pl_constant are derived. Each step of each training tests "
    "them.",
    scales={
        name: {
            "width": width,
            "num_weights": 10,
            "num_examples": num_examples,
            "gains": [0.5, 1.0],
            "num_seeds": num_seeds,
            "lr": 3e-3,
            "num_steps": num_steps,
        }
        for name, width, num_examples, num_seeds, num_steps in (
            ("small", 20, 200, 5, 200),
            ("full", 100, 1000, 20, 1500),
        )
    },
    cells=lambda settings: grid(
        gain=settings["gains"], variant=VARIANTS, seed=range(settings["num_seeds"])
    ),
    run=run,
    checks=checks,
    figure=figure,
)

"""ResNets without norms collapse as nets without skips do."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.modules import LitBNResNet
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import (
    STYLES,
    legend,
    measured,
    panels,
    plain_ticks,
)
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    between,
    grid,
    near,
)
from lit_resnorm.papers.labatie2019.propagation import (
    block_index,
    profile,
    random_net,
    scales,
    sites_of,
)
from lit_resnorm.papers.summaries import curve
from lit_resnorm.theory import residual_share

__all__ = ["NOBN"]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return rank and branch share by unit in one random net."""
    draw = cell["draw"]
    module = random_net(LitBNResNet, settings, draw, seed, norm="none")
    pattern = sites_of((unit - 1 for unit in settings["units"]), "act1|add")
    found = profile(settings, module, draw, seed, sites=pattern)
    rows: dict[int, Row] = {unit: {"unit": unit} for unit in settings["units"]}
    for site in found.sites[1:]:
        row = rows[block_index(site.name) + 1]
        if site.kind == "addition" and site.branch_share is not None:
            row["share"] = float(site.branch_share)
        elif site.kind == "activation" and site.effective_rank is not None:
            row["rank"] = float(site.effective_rank)
    return list(rows.values())


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the collapse."""
    ranks = curve(curves, "unit", "rank").mean
    shares = curve(curves, "unit", "share")
    last = settings["depth"]
    share = float(shares.mean[shares.x >= last / 2].mean())
    start, rank = float(ranks[0]), float(ranks[-1])
    found = [
        between(f"r_eff after ReLU at unit {last}", rank, 1.0, 1.3, "D"),
        near(
            "share of the branch in the variance, second half",
            share,
            residual_share("res", last),
            0.05,
            "D",
        ),
    ]
    name = f"r_eff after ReLU at unit {last} over that at unit 1"
    found.append(between(name, rank / start, None, 0.5, "P"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw the collapse."""
    drawing, axes = panels(
        1,
        2,
        title=f"ResNets without norms, width {settings['width']} "
        f"({settings['draws']} draws: mean, 1 sd)",
        size=(8.8, 4.2),
    )
    for one, name in zip(axes, ("rank", "share"), strict=True):
        part = curve(curves, "unit", name)
        measured(
            one,
            part.x,
            part.mean,
            STYLES["res2"],
            error=part.deviation,
            line=True,
            label="measured",
        )
        limit = 1.0 if name == "rank" else 0.5
        one.axhline(limit, color="#D55E00", ls="--", label="limit (derived)")
        one.set(xscale="log", xlabel="residual unit $l$")
    axes[0].set(yscale="log")
    plain_ticks(axes[0])
    axes[0].set(ylabel=r"effective rank after the unit's first ReLU")
    axes[1].set(ylabel="share of the branch in the variance", ylim=(0, 1))
    legend(drawing, axes)
    return drawing


UNITS = [1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 60, 70, 80, 90, 100]
NOBN = Item(
    **said_of("labatie2019.nobn"),
    claim="Skip connections alone don't prevent the collapse of the signal.",
    differs="No published figure: 1.14 at 100 units is this project's own value.",
    scales=scales({"draws": 6}, {"draws": 200}, depth=100, units=UNITS),
    cells=lambda settings: grid(draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

"""Collapse of the signal in nets without norms (Figure 3)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.modules import LitVanillaNet
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import (
    STYLES,
    legend,
    measured,
    panels,
    plain_ticks,
)
from lit_resnorm.papers.item import Cell, Check, Item, Row, Settings, grid
from lit_resnorm.papers.labatie2019.propagation import (
    block_index,
    kind_of,
    profile,
    random_net,
    scales,
    sites_of,
    stored_value,
)
from lit_resnorm.papers.summaries import curve, where

__all__ = ["FIG3"]

RANKS = {
    2: (5.558, 0.92),
    4: (5.514, 1.0),
    10: (2.81, 0.47),
    20: (1.667, 0.2),
    50: (1.155, 0.068),
    100: (1.043, 0.028),
    200: (1.010, 0.0075),
}
GROWTHS = {
    2: (1.146, 0.015),
    4: (1.093, 0.015),
    10: (1.041, 0.018),
    20: (1.014, 0.024),
    50: (1.001, 0.031),
    100: (1.006, 0.031),
    200: (0.999, 0.026),
}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return rank, sensitivity and its growth by layer in one random net."""
    draw = cell["draw"]
    module = random_net(LitVanillaNet, settings, draw, seed)
    layers = settings["layers"]
    blocks = {layer - 1 for layer in layers} | {layer - 2 for layer in layers} - {-1}
    found = profile(settings, module, draw, seed, sites=sites_of(blocks, "act1"))
    return [
        {
            "layer": block_index(site.name) + 1,
            "rank": float(site.effective_rank),
            "growth": float(site.delta),
            "log_chi": float(site.log_sensitivity),
        }
        for site in found.sites[1:]
        if block_index(site.name) + 1 in layers
        and site.effective_rank is not None
        and site.delta is not None
    ]


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 3."""
    found = []
    forgotten = settings["forgotten"]
    for layer in RANKS:
        part = where(curves, layer=layer)
        if layer >= forgotten and len(part):
            name = f"r_eff after ReLU at l={layer} (4 standard errors)"
            found.append(stored_value(name, part["rank"], *RANKS[layer]))
            name = f"delta chi at l={layer} (4 standard errors)"
            found.append(stored_value(name, part.growth, *GROWTHS[layer]))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 3."""
    drawing, axes = panels(
        1,
        2,
        title=f"ReLU nets, {kind_of(settings)}width {settings['width']}, without norms "
        f"collapse ({settings['draws']} draws: mean, 1 sd)",
        size=(8.8, 4.2),
    )
    names = (("rank", RANKS), ("growth", GROWTHS))
    for one, (name, stored) in zip(axes, names, strict=True):
        part = curve(curves, "layer", name)
        measured(
            one,
            part.x,
            part.mean,
            STYLES["res2"],
            error=part.deviation,
            line=True,
            label="measured",
        )
        if settings["kernel_size"] is None:
            one.plot(
                list(stored),
                [value for value, _ in stored.values()],
                "x",
                color="black",
                markersize=7,
                label="author's stored data, CIFAR-10 (paper)",
            )
        one.axhline(1, color="0.5", lw=0.8)
        one.set(xscale="log", xlabel="layer $l$")
    axes[0].set(yscale="log")
    plain_ticks(axes[0])
    axes[0].set(ylabel=r"effective rank $r_{\mathrm{eff}}$ after ReLU")
    axes[1].set_ylabel(r"growth of the sensitivity $\delta\chi^l$ a layer")
    legend(drawing, axes)
    return drawing


LAYERS = [2, 3, 4, 6, 10, 14, 20, 30, 50, 70, 100, 140, 200]
FIG3 = Item(
    **said_of("labatie2019.fig3"),
    claim="In nets without norms the signal collapses to a line: the effective rank "
    "and the growth of the normalised sensitivity tend to 1.",
    differs="small: fully connected, 64 digits a batch. Digits have another effective "
    "rank than CIFAR-10's images at the first layers, so values are compared from "
    "layer 20 on, where the input is forgotten; full: at all layers, on CIFAR-10.",
    scales=scales(
        {"draws": 6, "forgotten": 20},
        {"draws": 1000, "forgotten": 2},
        depth=200,
        layers=LAYERS,
    ),
    cells=lambda settings: grid(draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

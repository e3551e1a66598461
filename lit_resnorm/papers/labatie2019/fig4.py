"""Exponential growth of the sensitivity with batch norm (Figure 4)."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.modules import LitBNFeedForward
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import Look, legend, measured, panels
from lit_resnorm.papers.item import Cell, Check, Item, Row, Settings, near
from lit_resnorm.papers.labatie2019.propagation import (
    block_index,
    kind_of,
    profile,
    random_net,
    sites_of,
    stored_value,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.theory import activation_step

__all__ = ["FIG4"]

# By batch: mean and deviation of one draw over 200 draws (stored data).
SLOPES = {
    64: (0.2065, 0.0010),
    128: (0.1935, 0.0010),
    256: (0.1849, 0.0011),
    512: (0.1779, 0.0014),
}
RANKS = {64: (10.2, 2.4), 128: (4.57, 0.48), 256: (2.93, 0.18), 512: (2.41, 0.10)}
FOURTHS = {64: (3.73, 0.33), 128: (8.04, 0.88), 256: (18.3, 1.5), 512: (34.5, 2.5)}
STEPS = {
    64: (1.0250, 1.1997),
    128: (1.0458, 1.1611),
    256: (1.0827, 1.1116),
    512: (1.1153, 1.0719),
}
CONVOLUTIONAL_SLOPE = (0.1536, 0.0016)  # batch 64, MNIST
LOOKS = {64: ("-", "o"), 128: ("--", "s"), 256: ("-.", "^"), 512: (":", "D")}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return sensitivity, rank and moments by layer in one random net."""
    settings = {**settings, "batch": cell["batch"]}
    draw = cell["draw"]
    module = random_net(LitBNFeedForward, settings, draw, seed)
    layers = settings["layers"]
    before = sites_of((layer - 2 for layer in layers if layer > 1), "act1")
    chosen = sites_of((layer - 1 for layer in layers), "norm1|act1")
    found = profile(settings, module, draw, seed, sites=f"{chosen}|{before}")
    rows: dict[int, Row] = {layer: {"layer": layer} for layer in layers}
    for site in found.sites[1:]:
        row = rows.get(block_index(site.name) + 1)
        if row is None:
            continue
        if site.kind == "norm":
            values = {
                "mu4": site.mu4,
                "nu1": site.nu1,
                "delta_bn": site.delta_bn,
            }
        else:
            values = {
                "log_chi": site.log_sensitivity,
                "rank": site.effective_rank,
                "delta_phi": site.delta_phi,
            }
        row.update({k: float(v) for k, v in values.items() if v is not None})
    return list(rows.values())


def slope(part: pd.DataFrame) -> float:
    """Return the slope of log chi beyond layer 20."""
    deep = part[part.layer > 20]
    return float(np.polyfit(deep.layer, deep.log_chi, 1)[0])


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 4."""
    found = []
    last = where(curves, layer=settings["depth"])
    deep = cast(pd.DataFrame, curves[curves.layer >= 150])
    for batch in settings["draws"]:
        batch = int(batch)
        part = where(curves, batch=batch)
        slopes = [slope(one) for _, one in part.groupby("draw")]
        name = f"slope of log chi a layer, batch {batch}"
        # whole logs are fitted here, so finite width adds to the spread of a draw
        expected, deviation = SLOPES[batch]
        spread = max(
            deviation, float(np.std(slopes, ddof=1)) if len(slopes) > 1 else 0.0
        )
        found.append(
            stored_value(f"{name} (4 standard errors)", slopes, expected, spread)
        )
        at_end = where(last, batch=batch)
        name = f"r_eff after ReLU at l=200, batch {batch} (4 standard errors)"
        found.append(stored_value(name, at_end["rank"], *RANKS[batch]))
        name = f"mu_4(z) at l=200, batch {batch} (4 standard errors)"
        found.append(stored_value(name, at_end["mu4"], *FOURTHS[batch]))
        means = where(deep, batch=batch)
        for name, expected in zip(("delta_bn", "delta_phi"), STEPS[batch], strict=True):
            value = float(np.mean(means[name]))
            label = f"mean {name} from layer 150 on, batch {batch}"
            found.append(near(label, value, expected, 0.01, "P"))
        predicted = activation_step(float(np.mean(means["nu1"])))
        label = f"mean delta_phi, batch {batch}: theory from nu_1"
        found.append(
            near(label, float(np.mean(means["delta_phi"])), predicted, 0.01, "P")
        )
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 4."""
    drawing, axes = panels(
        2,
        2,
        title=f"Feed-forward nets with batch norm, {kind_of(settings)}width "
        f"{settings['width']}: sensitivity, rank, tails (mean over draws)",
        size=(9.2, 7.4),
    )
    shades = np.linspace(0.0, 0.6, len(settings["draws"]))
    for shade, batch in zip(shades, map(int, settings["draws"]), strict=True):
        part = where(curves, batch=batch)
        dashes, marker = LOOKS[batch]
        look = Look((0.0, shade, 1 - shade), marker, dashes, f"batch {batch}")
        names = ("log_chi", "rank", "mu4", "delta_phi")
        for one, name in zip(axes, names, strict=True):
            values = curve(part, "layer", name)
            measured(one, values.x, values.mean, look, line=True)
        values = curve(part, "layer", "delta_bn")
        axes[3].plot(values.x, values.mean, marker, color=look.colour, ls=dashes)
        logs = curve(part.query("layer > 20"), "layer", "log_chi")
        stored = CONVOLUTIONAL_SLOPE if kind_of(settings) else SLOPES[batch]
        line = logs.mean[0] + stored[0] * (logs.x - logs.x[0])
        name = "author's slopes, width 512 (paper)" if batch == 64 else None
        axes[0].plot(logs.x, line, color="0.4", lw=0.8, label=name)
    axes[0].set_ylabel(r"$\log \chi^l$ after ReLU")
    axes[1].set_ylabel(r"effective rank after ReLU")
    axes[2].set(ylabel=r"$\mu_4(z)$ after batch norm", yscale="log")
    axes[3].set_ylabel(r"$\delta_\phi$ (open), $\delta_{BN}$ (filled)")
    for one in axes:
        one.set_xlabel("layer $l$")
    legend(drawing, axes, columns=5)
    return drawing


LAYERS = [2, 5, 10, 15, 20, *range(25, 201, 12), 200]
FIG4 = Item(
    **said_of("labatie2019.fig4"),
    claim="With batch norm and no skips the normalised sensitivity grows exponentially "
    "with depth, at a rate that depends on the batch; the signal becomes fat-tailed.",
    differs="Fully connected nets (the stored runs in science terms: width 512, depth "
    "200); small: digits, 6 draws at batch 64 and 3 at each other, beyond layer 20, "
    "where the input is forgotten; measured at 20 layers instead of 100.",
    chosen="That growths are averaged from layer 150 on, where they have settled, and "
    "their tolerance of 0.01. The slope's tolerance takes the larger of the author's "
    "spread and ours, as whole logs are fitted.",
    scales={
        "small": {
            "device": "cpu",
            "data": "Digits",
            "kernel_size": None,
            "width": 512,
            "depth": 200,
            "layers": LAYERS,
            "draws": {"64": 6, "128": 3, "256": 3, "512": 3},
        },
        "full": {
            "device": "auto",
            "data": "CIFAR10",
            "kernel_size": None,
            "width": 512,
            "depth": 200,
            "layers": LAYERS,
            "draws": {"64": 1000, "128": 200, "256": 200, "512": 200},
        },
    },
    cells=lambda settings: [
        {"batch": int(batch), "draw": draw}
        for batch, draws in settings["draws"].items()
        for draw in range(draws)
    ],
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

"""Norms of hidden states and gradients in wide rectifier nets with He's weights."""

from __future__ import annotations

import math

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.norm_preservation import norm_preservation
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import Look, legend, measured, panels, theory
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    cell_seed,
    grid,
    near,
    ordered,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.papers.training import device

__all__ = ["GRADIENT", "HIDDEN", "log_ratio_deviation"]

LOOKS = (
    Look("#D55E00", "o", (0, (1, 1.2)), ""),
    Look("#009E73", "s", (0, (5, 1.5, 1, 1.5)), ""),
    Look("#0072B2", "^", (0, (5, 1.5)), ""),
    Look("#000000", "D", (0, (8, 2)), ""),
)
SCALES = {
    "small": {
        "device": "cpu",
        "widths": [100, 400, 1000],
        "depth": 10,
        "num_examples": 20,
        "draws": 40,
    },
    "full": {
        "device": "auto",
        "widths": [100, 400, 1000, 4000],
        "depth": 10,
        "num_examples": 1000,
        "draws": 40,
    },
}
DIFFERS = (
    "The text wasn't read; widths and depth are ours, inputs are Gaussian, and the "
    "loss is linear in the last pre-activation, so that its gradient there is the same "
    "for all weights. How far norms scatter is derived here: each layer multiplies a "
    "squared norm by a factor of variance 5/width."
)


def log_ratio_deviation(num_layers: int, width: int) -> float:
    """Return the standard deviation of the log of a ratio of norms.

    Each of the layers multiplies the squared norm by a mean over its units of squares
    of rectified (or masked) Gaussians, a factor of mean 1 and variance 5 / width.

    Args:
        num_layers: Number of such layers.
        width: Their number of units.
    """
    return 0.5 * math.sqrt(num_layers * math.log1p(5 / width))


def net_and_inputs(
    settings: Settings, width: int, draw: int, seed: int
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a net with He's weights, inputs, and directions of the loss's gradient.

    `depth` layers are followed by a rectifier, a last one is not.
    """
    torch.manual_seed(cell_seed(seed, width, draw))
    layers: list[nn.Module] = []
    for _ in range(settings["depth"] + 1):
        layer = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        layers += [layer, nn.ReLU()]
    x_ND = torch.randn(settings["num_examples"], width)
    direction_ND = torch.randn(settings["num_examples"], width)
    on = device(settings)
    return nn.Sequential(*layers[:-1]).to(on), (x_ND.to(on), direction_ND.to(on))


def along(output: Tensor, direction: Tensor) -> Tensor:
    """Return losses whose gradient at the output is the direction."""
    return (output * direction).sum(1)


def rows_of_net(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return ratios of norms by layer of one net: of states and of gradients."""
    net, batch = net_and_inputs(settings, cell["width"], cell["draw"], seed)
    found = norm_preservation(
        net, batch, forward=network_output, judge=OutputJudge(along)
    )
    kinds = {"hidden": found.hidden, "gradient": found.gradient}
    return [
        {
            "kind": kind,
            "layer": layer,
            "ratio": float(ratio.mean),
            "deviation": float(ratio.deviation),
        }
        for kind, ratios in kinds.items()
        for layer, ratio in enumerate(ratios.values(), 1)
    ]


def run_hidden(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the ratios of states, by layer."""
    rows = rows_of_net(settings, cell, seed)
    return [row for row in rows if row["kind"] == "hidden"]


def run_gradient(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the ratios of gradients, by layer."""
    rows = rows_of_net(settings, cell, seed)
    return [row for row in rows if row["kind"] == "gradient"]


def num_factors(kind: str, layer: int, depth: int) -> int:
    """Return how many layers a ratio has passed: of a gradient, all but its own."""
    return layer if kind == "hidden" else depth


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the ratios of one kind."""
    kind, depth = str(curves["kind"].iloc[0]), settings["depth"]
    found, largest = [], {}
    for width in settings["widths"]:
        rows = where(curves, width=width)
        ratios = curve(rows, "layer", "ratio")
        # The mean of a log-normal's root is below 1 by an eighth of the variance.
        passed = [num_factors(kind, int(layer), depth) for layer in ratios.x]
        means = [
            math.exp(-(log_ratio_deviation(num, width) ** 2) / 2) for num in passed
        ]
        furthest = int(abs(ratios.mean - means).argmax())
        found.append(
            near(
                f"mean ratio at width {width}, layer furthest from what is expected"
                " (4 standard errors)",
                float(ratios.mean[furthest]),
                means[furthest],
                4 * max(float(ratios.error[furthest]), 1e-6),
                "D",
            )
        )
        largest[f"width {width}"] = float(rows["deviation"].to_numpy().mean())
    falling = dict(reversed([*largest.items()]))
    found.append(ordered(f"largest distance from 1 ({kind})", falling, "A"))
    few, many = settings["widths"][0], settings["widths"][-1]
    names = [f"width {few}", f"width {many}"]
    found.append(
        near(
            f"power of the width with which it falls ({few} to {many})",
            math.log(largest[names[1]] / largest[names[0]]) / math.log(many / few),
            -0.5,
            0.15,
            "A",
        )
    )
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw ratios by layer and distances from 1 by width."""
    kind, depth = str(curves["kind"].iloc[0]), settings["depth"]
    what = (
        "hidden states over input"
        if kind == "hidden"
        else ("gradients of weights over input times error")
    )
    drawing, axes = panels(
        1,
        2,
        title=f"Norms of {what}: He's weights, {depth} layers, {settings['draws']}"
        f" draws of {settings['num_examples']} examples",
        size=(9.6, 4.4),
    )
    for width, look in zip(settings["widths"], LOOKS, strict=False):
        rows = where(curves, width=width)
        ratios = curve(rows, "layer", "ratio")
        passed = [num_factors(kind, int(layer), depth) for layer in ratios.x]
        expected = [
            math.exp(-(log_ratio_deviation(num, width) ** 2) / 2) for num in passed
        ]
        label = f"width {width}"
        theory(axes[0], ratios.x, expected, look, f"{label}, theory (derived)")
        measured(axes[0], ratios.x, ratios.mean, look, error=ratios.error, label=label)
        furthest = curve(rows, "layer", "deviation")
        measured(axes[1], furthest.x, furthest.mean, look, line=True, label=label)
    axes[0].axhline(1, color="0.6", lw=1, zorder=0)
    axes[0].set(xlabel="layer", ylabel="mean ratio over examples")
    axes[1].set(xlabel="layer", ylabel="largest distance from 1", yscale="log")
    legend(drawing, axes)
    return drawing


def _nets_drawn(settings: Settings) -> list[Cell]:
    return grid(width=settings["widths"], draw=range(settings["draws"]))


HIDDEN = Item(
    **said_of("arpit2019.hidden"),
    claim="With He's initialisation a deep rectifier network keeps the norm of its "
    "input in every hidden state, the better the wider it is.",
    differs=DIFFERS,
    scales=SCALES,
    cells=_nets_drawn,
    run=run_hidden,
    checks=checks,
    figure=figure,
)
GRADIENT = Item(
    **said_of("arpit2019.gradient"),
    claim="The gradient of each layer's weights has the norm of the input times that "
    "of the error at the last pre-activation, the better the wider the network is.",
    differs=DIFFERS,
    scales=SCALES,
    cells=_nets_drawn,
    run=run_gradient,
    checks=checks,
    figure=figure,
)

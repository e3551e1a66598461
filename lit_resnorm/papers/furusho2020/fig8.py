"""Final loss over depth and learning rate, and the rate bound (Figure 8)."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lit_resnorm.data import MNIST, Gaussian
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.drawing import STYLES, legend, panels
from lit_resnorm.papers.furusho2020.source import SOURCE, build
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    all_of,
    cell_seed,
    grid,
    near,
)
from lit_resnorm.papers.summaries import where
from lit_resnorm.papers.training import Losses, device, examples, fit_full_batch

__all__ = ["FIG8"]

VARIANTS = ("mlp", "res2", "res2_bn")
TOO_LARGE = 1000.0


def regression(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs of `width` features and targets of one output."""
    num, width = settings["num_examples"], settings["width"]
    if settings["data"] == "MNIST":
        data = MNIST(num_train=num, num_val=0, num_test=1, seed=seed)
        x, y = examples(data, "train")
        targets = (y.float() - y.float().mean()) / y.float().std()
        return x, targets[:, None]
    data = Gaussian(
        dim=width,
        num_train=num,
        num_val=1,
        num_test=1,
        num_classes=1,
        targets="real",
        seed=seed,
    )
    return examples(data, "train")


def net(
    settings: Settings, cell: Cell, in_shape: tuple[int, ...], rate: float, seed: int
) -> LitClassifier:
    """Return the net of a cell, which descends at `rate`."""
    torch.manual_seed(cell_seed(seed, "net", cell["draw"]))
    return build(
        cell["variant"],
        cell["depth"],
        settings["width"],
        in_shape=in_shape,
        num_classes=1,
        loss="mse",
        train_head=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=rate),
    )


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the final loss at every learning rate for one variant and depth.

    Rates are powers of sqrt 2 around the bound 2 / lambda_max of the very net.
    """
    x, y = regression(settings, cell_seed(seed, "data", cell["draw"]))
    place, shape = device(settings), tuple(x.shape[1:])
    module = net(settings, cell, shape, 1.0, seed).to(place)
    spectrum = fisher_spectrum(
        module, x.to(place), output="gaussian", num_eigenvalues=1
    )
    bound = spectrum.rate_bound
    rows = []
    for power in range(-settings["below"], settings["above"] + 1):
        rate = bound * 2.0 ** (power / 2)
        module = net(settings, cell, shape, rate, seed)
        losses = Losses()
        fit_full_batch(
            module,
            x,
            y,
            settings["num_steps"] + 1,
            callbacks=[losses],
            accelerator="gpu" if place.type == "cuda" else "cpu",
        )
        last = math.inf if module.diverged else losses.rows[-1]["train"]
        rows.append({"rate": rate, "bound": bound, "loss": last})
    return rows


def boundaries(curves: pd.DataFrame) -> pd.DataFrame:
    """Return, by variant and depth, where training begins to diverge.

    The boundary is between the largest rate below every diverging one and the smallest
    that diverges, in the middle of their logs; mean of logs over draws.
    """
    rows = []
    for key, part in curves.groupby(["variant", "depth", "draw"]):
        variant, depth, draw = cast(tuple[str, int, int], key)
        ordered_rates = part.sort_values("rate")
        diverged = (ordered_rates.loss > TOO_LARGE).to_numpy()
        rates = ordered_rates.rate.to_numpy()
        first = int(diverged.argmax()) if diverged.any() else len(rates)
        # without a diverging rate the boundary lies beyond the grid
        lower = rates[max(first - 1, 0)]
        upper = rates[first] if first < len(rates) else rates[-1] * math.sqrt(2)
        rows.append(
            {
                "variant": variant,
                "depth": depth,
                "draw": draw,
                "log_rate": math.log(lower * upper) / 2,
                "in_bounds": math.log(upper / part.bound.iloc[0]),
            }
        )
    found = pd.DataFrame(rows).groupby(["variant", "depth"])
    means = cast(pd.DataFrame, found[["log_rate", "in_bounds"]].mean())
    return means.map(math.exp).rename(columns={"log_rate": "rate"})


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 8."""
    del settings
    below = curves[curves.rate < curves.bound * (1 - 1e-9)]
    found = [
        all_of(
            f"loss at most {TOO_LARGE:.0f} below the curve, {variant}, runs",
            "every run",
            int((part.loss <= TOO_LARGE).sum()),
            len(part),
            "A",
        )
        for variant, part in below.groupby("variant", sort=False)
    ]
    edge = boundaries(curves).rate
    depths = np.array(edge["res2"].index, dtype=float)
    scaled = np.log2(edge["res2"].to_numpy() * depths)
    found.append(
        near(
            "ResNet: slope of log2(boundary x L) by block",
            float(np.polyfit(depths, scaled, 1)[0]),
            -1.0,
            0.25,
            "D",
        )
    )
    depths = np.array(edge["res2_bn"].index, dtype=float)
    power = np.polyfit(np.log(depths), np.log(edge["res2_bn"].to_numpy()), 1)[0]
    name = "ResNet with BN: power of L of the boundary"
    found.append(near(name, float(power), -1.2, 0.3, "D"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 8."""
    drawing, axes = panels(
        1,
        3,
        title=f"Loss after {settings['num_steps']} steps of gradient descent "
        f"(width {settings['width']}, N = {settings['num_examples']}; white: above "
        f"{TOO_LARGE:.0f})",
        size=(11.0, 4.4),
    )
    shown = curves.loss.where(curves.loss <= TOO_LARGE)
    norm = LogNorm(max(float(shown.min()), 1e-6), float(shown.max()))
    image = None
    for one, variant in zip(axes, VARIANTS, strict=True):
        part = cast(pd.DataFrame, where(curves, variant=variant))
        image = _map(one, part, settings, norm)
        one.set_title(STYLES[variant].label, fontsize=10)
    if image is not None:
        drawing.colorbar(image, ax=axes, label="final loss (half squared error)")
    legend(drawing, axes)
    return drawing


def _map(
    axes: Axes, part: pd.DataFrame, settings: Settings, norm: LogNorm
) -> QuadMesh | None:
    depths = list(settings["depths"])
    image = None
    for place, depth in enumerate(depths):
        cells = where(part, depth=depth)
        cells = cells.assign(power=(np.log2(cells.rate / cells.bound) * 2).round())
        logs = cells.assign(log_rate=np.log(cells.rate)).groupby("power")
        rates = np.exp(logs.log_rate.mean().to_numpy())
        # a cell is white where any draw diverged
        losses = logs.loss.max().where(lambda loss: loss <= TOO_LARGE).to_numpy()
        edges = np.concatenate([rates[:1] * 2**-0.25, rates * 2**0.25])
        image = axes.pcolormesh(
            [place - 0.45, place + 0.45],
            edges,
            losses[:, None],
            norm=norm,
            cmap="viridis_r",
        )
    bound = np.exp(np.log(part.bound).groupby(part.depth).mean())
    axes.plot(
        range(len(depths)),
        bound[depths],
        color="black",
        marker="o",
        markerfacecolor="white",
        label=r"$\eta = 2 / \lambda_{\max}$ (measured)",
    )
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set(
        yscale="log", xlabel="number of blocks $L$", ylabel=r"learning rate $\eta$"
    )
    return image


FIG8 = Item(
    name="furusho2020.fig8",
    title="Final loss over depth and learning rate, with the bound 2 / lambda_max",
    source=f"{SOURCE}, Figure 8 (caption)",
    mark="A",
    claim="Gradient descent trains below the curve eta = 2 / lambda_max of the Fisher "
    "matrix; for ResNets the curve falls exponentially with depth, with batch norm "
    "slowly.",
    differs="Rates lie on a grid of factors sqrt 2 around each net's own measured "
    "bound, so that the boundary is resolved at each depth; full-batch descent on a "
    "regression of one output, read-out frozen as in the theory. small: Gaussian "
    "inputs; full: 500 examples of MNIST.",
    scales={
        "small": {
            "device": "cpu",
            "data": "gauss",
            "width": 64,
            "num_examples": 50,
            "depths": [1, 2, 4, 8],
            "below": 6,
            "above": 10,
            "num_steps": 60,
            "draws": 2,
        },
        "full": {
            "device": "auto",
            "data": "MNIST",
            "width": 512,
            "num_examples": 500,
            "depths": [1, 2, 3, 5, 7, 10, 14, 20],
            "below": 15,
            "above": 14,
            "num_steps": 200,
            "draws": 3,
        },
    },
    cells=lambda settings: grid(
        variant=VARIANTS, depth=settings["depths"], draw=range(settings["draws"])
    ),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

"""Final loss over depth and learning rate, and the rate bound (Figure 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_resnorm.data import MNIST, Gaussian
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.furusho2020.fig8_verdict import VARIANTS, checks, figure
from lit_resnorm.papers.furusho2020.source import build
from lit_resnorm.papers.item import Cell, Item, Row, Settings, cell_seed, grid
from lit_resnorm.papers.training import LossCurves, device, examples, fit_full_batch

__all__ = ["FIG8"]


def wide_regression(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
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


def net_at_rate(
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
    x, y = wide_regression(settings, cell_seed(seed, "data", cell["draw"]))
    place, shape = device(settings), tuple(x.shape[1:])
    module = net_at_rate(settings, cell, shape, 1.0, seed).to(place)
    spectrum = fisher_spectrum(
        module, x.to(place), output="gaussian", num_eigenvalues=1
    )
    bound = spectrum.rate_bound
    rows = []
    for power in range(-settings["below"], settings["above"] + 1):
        rate = bound * 2.0 ** (power / 2)
        module = net_at_rate(settings, cell, shape, rate, seed)
        losses = LossCurves()
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


FIG8 = Item(
    **said_of("furusho2020.fig8"),
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

"""Blocks that share their weights: what that does to states before training."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.data import Digits
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.modules import LitClassifier, LitPreactResNet, LitSharedResNet
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import Look, legend, measured, panels
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    cell_seed,
    grid,
    ordered,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.papers.training import examples

__all__ = ["SHARING"]

LOOKS = {
    "own": Look("#009E73", "s", (0, (5, 1.5, 1, 1.5)), "every block its own"),
    "unshared": Look("#0072B2", "^", (0, (5, 1.5)), "shared, batch norms unshared"),
    "naive": Look("#D55E00", "o", (0, (1, 1.2)), "shared naively"),
}
SHARED: dict[str, dict[str, Any]] = {
    "unshared": {"unshare_bn": "stats+affine", "gamma_init": 0.1},
    "naive": {"unshare_bn": "none", "gamma_init": 1.0},
}


def net_of_kind(settings: Settings, kind: str) -> LitClassifier:
    """Return a net of one stage whose blocks are their own or one, on digits."""
    options: dict[str, Any] = {
        "stages": [settings["depth"]],
        "width": settings["width"],
        "in_shape": (1, 8, 8),
        "num_classes": 10,
    }
    if kind == "own":
        return LitPreactResNet(**options)
    return LitSharedResNet(shared=settings["shared"], **options, **SHARED[kind])


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return norms of states and of gradients by block, of one net before training."""
    data = Digits(num_workers=0, seed=cell_seed(seed, "data"))
    x, y = (part[: settings["num_examples"]] for part in examples(data, "train"))
    torch.manual_seed(cell_seed(seed, "net", cell["draw"]))
    module = net_of_kind(settings, cell["kind"])
    states: dict[int, Tensor] = {}

    def tap(block: int, name: str, value: Tensor) -> None:
        if name == "in":
            states[block] = value

    with untouched(module, norm_mode="train") as passes:
        output = passes(lambda: module.net(x, tap))
        loss = F.cross_entropy(output, y)
        gradients = torch.autograd.grad(loss, [*states.values()])
    return [
        {
            "block": block + 1,
            "state": float(state.detach().flatten(1).norm(dim=1).mean()),
            "gradient": float(gradient.norm()),
        }
        for (block, state), gradient in zip(states.items(), gradients, strict=True)
    ]


def _growth(curves: pd.DataFrame, settings: Settings, kind: str, name: str) -> float:
    """Return by what factor a norm grows over the shared blocks, mean over draws.

    A state's from the first of them to the last, a gradient's from the last back.
    """
    rows = where(curves, kind=kind)
    mean = curve(rows, "block", name).mean
    first = settings["depth"] - settings["shared"]
    factor = float(mean[-1] / mean[first])
    return factor if name == "state" else 1 / factor


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the growth of states and gradients before training."""
    found = []
    for name, words in (
        ("state", "state from the first to the last shared block"),
        ("gradient", "gradient back from the last to the first"),
    ):
        factors = {
            LOOKS[kind].label: _growth(curves, settings, kind, name)
            for kind in ("unshared", "own", "naive")
        }
        found.append(ordered(f"growth of the {words}, before training", factors, "P"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw norms of states and gradients by block."""
    drawing, axes = panels(
        1,
        2,
        title=f"Before training: {settings['depth']} blocks of width"
        f" {settings['width']}, the last {settings['shared']} shared,"
        f" {settings['draws']} draws",
        size=(9.6, 4.2),
    )
    for kind, look in LOOKS.items():
        rows = where(curves, kind=kind)
        for one, name in zip(axes, ("state", "gradient"), strict=True):
            found = curve(rows, "block", name)
            measured(one, found.x, found.mean, look, error=found.error, line=True)
    axes[0].set(xlabel="block", ylabel="norm of its input", yscale="log")
    axes[1].set(
        xlabel="block", ylabel="norm of the gradient at its input", yscale="log"
    )
    legend(drawing, axes)
    return drawing


_SMALL = {
    "depth": 10,
    "shared": 8,
    "width": 8,
    "num_examples": 128,
    "draws": 8,
}

SHARING = Item(
    **said_of("jastrzebski2018.sharing"),
    claim="Blocks that share all weights let states and gradients explode at "
    "initialisation, and over-fit; batch norms of their own, with small factors, mend "
    "both. Error on CIFAR-10 (training/test, %): ResNet-110 with shared blocks and "
    "unshared batch norms 0.63/6.62, ResNet-32 of as many parameters 1.53/7.14, "
    "ResNet-110 0.22/6.13.",
    differs="Digits and narrow nets, at initialisation: batch norm by the batch's own "
    "statistics. The errors after training on CIFAR-10 aren't judged here, at either "
    "scale: a net of this size doesn't over-fit digits.",
    scales={"small": _SMALL, "full": {**_SMALL, "width": 32, "draws": 40}},
    cells=lambda settings: grid(kind=[*LOOKS], draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
)

"""Larger rates lead to less gradient noise, in more directions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.fisher import Examinations
from lit_resnorm.measures.gradient_covariance import batch_covariance_spectrum
from lit_resnorm.measures.losses.probe_loss import read_loss
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import legend, panels
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    grid,
    near,
    not_shown,
    ordered,
)
from lit_resnorm.papers.jastrzebski2020.recipe import (
    LOOKS,
    SCALES,
    LabelledBatch,
    trajectories,
)
from lit_resnorm.papers.summaries import where

__all__ = ["NOISE"]

PUBLISHED = {"lambda_max": 3.01 / 0.87, "trace_over_max": 10.69 / 14.29}
"""Values at rate 0.01 over those at 0.1, of a model that isn't named [P]."""


TITLES = {
    "lambda_max": "largest eigenvalue of K on the way",
    "trace": "largest trace of K on the way",
    "conditioning": "smallest over largest eigenvalue of K",
    "trace_over_max": "trace of K over its largest eigenvalue",
}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the spectrum of the covariance of mini-batch gradients along training."""

    def measure(
        net: nn.Module, batch: LabelledBatch, known: Examinations
    ) -> Mapping[str, float]:
        found = batch_covariance_spectrum(
            net,
            batch,
            read_loss(net, batch),
            num_batches=settings["num_batches"],
            batch_size=settings["size_of_batches"],
            examinations=known,
        )
        return {
            "lambda_max": found.max,
            "trace": found.trace,
            "conditioning": found.conditioning,
            "trace_over_max": found.trace_over_max,
            "variance": variance(net, batch, settings),
        }

    return trajectories(settings, cell["draw"], seed, measure)


def variance(net: nn.Module, batch: LabelledBatch, settings: Settings) -> float:
    """Return the variance of the same gradients, from the gradients themselves."""
    x, y = batch
    size, parameters = settings["size_of_batches"], [*net.parameters()]
    gradients = []
    for at in range(0, settings["num_batches"] * size, size):
        loss = F.cross_entropy(net(x[at : at + size]), y[at : at + size])
        grads = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([grad.flatten() for grad in grads]).double())
    gradients_MP = torch.stack(gradients)
    return float((gradients_MP - gradients_MP.mean(0)).square().sum(1).mean())


def extremes(curves: pd.DataFrame, settings: Settings) -> dict[str, list[float]]:
    """Return by quantity its value at each rate.

    Of eigenvalue and trace the largest on the way. Of the two shapes the mean over the
    second half of the way to the last loss, where curvature has grown: those of the
    first steps are of nets that have learned nothing.
    """
    half = (math.log(10) + settings["loss"]) / 2
    found: dict[str, list[float]] = {name: [] for name in TITLES}
    for rate in settings["rates"]:
        whole = where(curves, rate=rate)
        for name, values in found.items():
            numbers = np.asarray(whole[name], dtype=float)
            draws = np.asarray(whole["draw"])
            if name in ("lambda_max", "trace"):
                tops = [numbers[draws == draw].max() for draw in np.unique(draws)]
                values.append(float(np.mean(tops)))
            else:
                grown = np.asarray(whole["loss"], dtype=float) <= half
                values.append(float(numbers[grown].mean()))
    return found


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the order of the rates."""
    found = extremes(curves, settings)
    rates = [f"{rate}" for rate in settings["rates"]]
    judged = []
    for name, title in TITLES.items():
        pairs = [*zip(rates, found[name], strict=True)]
        if name in ("conditioning", "trace_over_max"):
            ends = dict([pairs[0], pairs[-1]])
            judged.append(ordered(f"{title}, lowest and highest rate", ends, "A"))
        else:
            judged.append(ordered(f"{title}, by rate", dict(pairs[::-1]), "A"))
    ratio = np.asarray(curves["trace"] / curves["variance"], dtype=float)
    worst = float(ratio[np.abs(ratio - 1).argmax()])
    judged.append(near("trace of K over the gradients' variance", worst, 1, 1e-3, "D"))
    judged += [
        not_shown(
            near(
                f"{TITLES[name]}, lowest rate over highest",
                found[name][0] / found[name][-1],
                expected,
                0.25,
                "P",
                relative=True,
            )
        )
        for name, expected in PUBLISHED.items()
    ]
    return judged


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw eigenvalue, trace and shapes against the training loss."""
    drawing, axes = panels(
        2, 2, title="Gradient noise on the way to one training loss", size=(9, 6.6)
    )
    labels = {
        "lambda_max": r"$\lambda^1_K$",
        "trace": r"tr $K$",
        "conditioning": r"$\lambda^*_K / \lambda^1_K$",
        "trace_over_max": r"tr $K / \lambda^1_K$",
    }
    for one, (name, label) in zip(axes, labels.items(), strict=True):
        for rate, look in zip(settings["rates"], LOOKS, strict=True):
            rows = where(curves, rate=rate, draw=0)
            one.plot(
                rows["loss"], rows[name], color=look.colour, label=rf"$\eta$ = {rate}"
            )
        one.invert_xaxis()
        one.set(xlabel="training loss", ylabel=label)
    legend(drawing, axes[:1])
    return drawing


NOISE = Item(
    **said_of("jastrzebski2020.noise"),
    claim="A larger rate leads, past the break-even point, to a smaller largest "
    "eigenvalue and trace of the covariance K of gradients, and to a K that is better "
    "conditioned.",
    differs="The nets and data of jastrzebski2020.break_even. K is of 10 mini-batches "
    "of 64 (full: 25 of 128) of the training set. Largest values on the way to one "
    "loss are compared, and the mean conditioning over the second half of that way.",
    chosen="See jastrzebski2020.break_even. The half of the way over which shapes are "
    "averaged; and that these are compared at the lowest and the highest rate, as one "
    "draw doesn't tell the middle rate from the highest. The published numbers are of "
    "another net and other rates: what they give as factors isn't judged.",
    scales=SCALES,
    cells=lambda settings: grid(draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

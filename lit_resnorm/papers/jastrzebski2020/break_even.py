"""Curvature grows until the steps no longer bear it: earlier at larger rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import nn

from lit_resnorm.measures.fisher import Examinations
from lit_resnorm.measures.hessian import Growth, hessian_spectrum
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import legend, panels
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    all_of,
    between,
    cell_seed,
    near,
    ordered,
)
from lit_resnorm.papers.jastrzebski2020.recipe import (
    LOOKS,
    SCALES,
    LabelledBatch,
    trajectories,
)
from lit_resnorm.papers.summaries import where
from lit_resnorm.papers.training import fit_full_batch

__all__ = ["BREAK_EVEN"]

TOL = 1e-2


def lambda_max(
    net: nn.Module, batch: LabelledBatch, known: Examinations
) -> Mapping[str, float]:
    """Return the largest eigenvalue of the Hessian on the training set."""
    found = hessian_spectrum(
        net, batch, tol=TOL, smallest_tol=None, num_trace_vectors=0, examinations=known
    )
    return {"lambda_max": found.max}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return the largest eigenvalue along training."""
    if cell["kind"] == "descent":
        return descent(settings, cell["draw"], seed)
    return trajectories(settings, cell["draw"], seed, lambda_max)


def descent(settings: Settings, draw: int, seed: int) -> list[Row]:
    """Return the largest eigenvalue along plain gradient descent on all examples.

    A tanh net on half the squared distance, whose curvature has no jumps.
    """
    options = settings["descent"]
    torch.manual_seed(cell_seed(seed, "descent", draw))
    x = torch.randn(options["num_train"], 64)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(64, 64), nn.Tanh()]
    module = LitClassifier(
        nn.Sequential(*layers, nn.Linear(64, 10)),
        loss="mse",
        optimizer=lambda params: torch.optim.SGD(params, lr=options["rate"]),
    )
    y = torch.randn(64, 10)
    labels = (x @ y).argmax(1)
    followed = _Descent((x, labels), options["every"])
    fit_full_batch(module, x, labels, options["num_steps"] + 1, callbacks=[followed])
    return [{"rate": options["rate"], **row} for row in followed.rows]


class _Descent(Callback):
    """Notes the largest eigenvalue along a fit."""

    def __init__(self, batch: LabelledBatch, every: int) -> None:
        self.rows: list[Row] = []
        self._batch, self._every, self._known = batch, every, Examinations()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the weights that the coming step sees."""
        del batch, batch_idx
        if trainer.global_step % self._every == 0:
            row = lambda_max(pl_module, self._batch, self._known)
            self.rows.append({"step": trainer.global_step, **row})


def column(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column's numbers."""
    return np.asarray(rows[name], dtype=float)


def break_even(rows: pd.DataFrame) -> int | None:
    """Return the break-even step of one training; None where growth did not end."""
    growth = Growth(TOL)
    for step, value in zip(
        column(rows, "step"), column(rows, "lambda_max"), strict=True
    ):
        growth.add(int(step), float(value))
    return growth.ended_at


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the break-even points and the curvature that is reached."""
    highest: dict[float, float] = {}
    steps: dict[float, list[int | None]] = {}
    for rate in settings["rates"]:
        trained = [
            where(curves, kind="rates", rate=rate, draw=draw)
            for draw in range(settings["draws"])
        ]
        tops = [column(rows, "lambda_max").max() for rows in trained]
        highest[rate] = float(np.mean(tops))
        steps[rate] = [break_even(rows) for rows in trained]
    every = [step for each in steps.values() for step in each]
    falling = settings["rates"][::-1]
    late = {
        f"{rate}": float(np.mean([np.inf if s is None else s for s in steps[rate]]))
        for rate in (falling[0], falling[-1])
    }
    plain = where(curves, kind="descent")
    end = column(plain, "step") >= 0.75 * column(plain, "step").max()
    settled = float((column(plain, "lambda_max") * column(plain, "rate"))[end].mean())
    share = "largest lambda_max over 2 / rate, at rate"
    return [
        ordered(
            f"largest lambda_max up to a loss of {settings['loss']}, by rate",
            {f"{rate}": highest[rate] for rate in falling},
            "A",
        ),
        all_of(
            "trainings with a break-even step after their first",
            "all",
            sum(step is not None and step > 0 for step in every),
            len(every),
            "D",
        ),
        ordered("break-even step, highest and lowest rate", late, "A"),
        *(
            between(f"{share} {rate}", highest[rate] * rate / 2, 0.5, 1.5, "D")
            for rate in settings["rates"]
        ),
        near(
            "plain descent: lambda_max over 2 / rate, at the end",
            settled / 2,
            1,
            0.15,
            "D",
        ),
    ]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw lambda_max along training, and along plain descent."""
    drawing, axes = panels(
        1, 2, title="Curvature grows until steps no longer bear it", size=(10, 4.4)
    )
    trained = where(curves, kind="rates", draw=0)
    for rate, look in zip(settings["rates"], LOOKS, strict=True):
        rows = where(trained, rate=rate)
        label = rf"$\eta$ = {rate}"
        axes[0].plot(rows["step"], rows["lambda_max"], color=look.colour, label=label)
        axes[0].axhline(2 / rate, color=look.colour, ls=":", lw=1)
        step = break_even(rows)
        if step is not None:
            value = column(where(rows, step=step), "lambda_max")[0]
            axes[0].plot([step], [value], look.marker, color=look.colour, mfc="white")
    axes[0].set(yscale="log", xlabel="optimizer step")
    axes[0].set_ylabel(r"$\lambda_{\max}$ of the Hessian (dotted: 2 / $\eta$)")
    axes[0].set_title("small batches; markers: break-even", fontsize=10)
    plain = where(curves, kind="descent", draw=0)
    rate = settings["descent"]["rate"]
    axes[1].plot(plain["step"], plain["lambda_max"], color="#0072B2")
    axes[1].axhline(2 / rate, color="#0072B2", ls=":", lw=1)
    axes[1].set(xlabel="step of gradient descent", ylabel=r"$\lambda_{\max}$")
    axes[1].set_title(rf"all examples, $\eta$ = {rate}", fontsize=10)
    legend(drawing, axes[:1])
    return drawing


BREAK_EVEN = Item(
    **said_of("jastrzebski2020.break_even"),
    claim="Early in training the curvature grows until the steps become unstable along "
    "the sharpest direction: the break-even point. A larger rate reaches it earlier, "
    "at a smaller largest eigenvalue of the Hessian.",
    differs="small: a ReLU net of three layers of 96 on 640 digits, half of the labels "
    "random, at rates 0.05, 0.1, 0.4, in place of convolutional nets on CIFAR-10; "
    "full: a width of 512 on CIFAR-10. Rates are compared up to one training loss. "
    "Plain gradient descent is a tanh net on a squared error.",
    chosen="Rates, width, the share of random labels and the loss to which nets are "
    "followed: clean labels and He initialisation show no growth at this size. That "
    "the break-even step is the first record that the next measurement does not pass, "
    "and is compared at the highest and the lowest rate: measured every 100 steps, two "
    "neighbouring rates share one, and a record that five measurements do not pass is "
    "not reached on the way.",
    scales={
        name: {
            **scale,
            "descent": {
                "num_train": 200,
                "rate": 0.6,
                "num_steps": 800,
                "every": 25,
            },
        }
        for name, scale in SCALES.items()
    },
    cells=lambda settings: [
        {"kind": kind, "draw": draw}
        for kind, draws in (("rates", settings["draws"]), ("descent", 1))
        for draw in range(draws)
    ],
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

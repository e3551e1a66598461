"""Stability of ten-layer nets under the removal of one example (Figure 5)."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.data import MNIST, Digits
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, panels
from lit_resnorm.papers.furusho2020.recipe import SCALES, VARIANTS, net
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    all_of,
    cell_seed,
    grid,
    ordered,
)
from lit_resnorm.papers.summaries import means, where
from lit_resnorm.papers.training import device, quiet
from lit_resnorm_callbacks import StabilityProbe
from lit_resnorm_callbacks.probe.cadence import Cadence

__all__ = ["FIG5"]

QUANTITIES = ("eps_hyp", "eps_point", "eps_unif", "generalization_gap", "diverged")


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return stability at the end of one training with its twins."""
    draw = cell["draw"]
    num_train = settings["num_train"]
    kind = Digits if settings["data"] == "Digits" else MNIST
    data = kind(
        num_train=num_train,
        num_val=0,
        num_test=settings["num_test"],
        batch_size=num_train,
        seed=cell_seed(seed, "digits", draw),
    )
    module = net(settings, cell["variant"], draw, seed)
    probe = StabilityProbe(
        num_twins=settings["num_removed"],
        seed=cell_seed(seed, "removed", draw),
        num_examples=settings["num_test"],
        cadence=Cadence(settings["num_steps"], at_start=False, at_end=True),
        strict=True,
    )
    on_gpu = device(settings).type == "cuda"
    with quiet():
        trainer = L.Trainer(
            max_steps=settings["num_steps"],
            max_epochs=-1,
            limit_val_batches=0,
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            callbacks=[probe],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    values = trainer.callback_metrics
    return [{name: float(values[f"stability/{name}"]) for name in QUANTITIES}]


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 5."""
    mean = means(curves, "variant", "eps_hyp")
    total = settings["num_removed"] * len(curves)
    diverged = int(curves.diverged.sum())
    pairs = {name: mean[name] for name in ("res2", "res1", "mlp")}
    return [
        all_of("twins that didn't diverge", "every twin", total - diverged, total, "D"),
        ordered("eps_hyp (nats)", pairs, "A"),
        ordered(
            "eps_hyp (nats), skips against none",
            {name: pairs[name] for name in ("res1", "mlp")},
            "A",
        ),
    ]


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 5."""
    drawing, axes = panels(
        1,
        3,
        title=f"Stability: {settings['num_removed']} removals in each of "
        f"{settings['num_draws']} trainings (points: trainings; bars: their means)",
        size=(10.2, 4.0),
    )
    names = {
        "eps_hyp": "hypothesis stability (test examples)",
        "eps_point": "pointwise stability (the removed examples)",
        "generalization_gap": "generalisation gap (probe minus removed)",
    }
    for one, (name, title) in zip(axes, names.items(), strict=True):
        for place, variant in enumerate(VARIANTS):
            values = np.asarray(where(curves, variant=variant)[name])
            look = STYLES[variant]
            one.bar(
                place, values.mean(), color=look.colour, alpha=0.3, edgecolor="black"
            )
            places = place + np.linspace(-0.15, 0.15, len(values))
            one.plot(places, values, look.marker, color=look.colour, mfc="white")
        labels = [STYLES[variant].label for variant in VARIANTS]
        one.set_xticks(range(len(VARIANTS)), labels, fontsize=8, rotation=12)
        one.set(ylabel="difference of losses (nats)")
        one.set_title(title, fontsize=9)
    return drawing


FIG5 = Item(
    **said_of("furusho2020.fig5"),
    claim="Nets that skip two layers are the most stable, then those that skip one, "
    "then those without skips.",
    differs="Which stability, how many removals and which loss the figure shows isn't "
    "known; three are measured, by StabilityProbe's twins, on the recipe of Figure 4. "
    "Hypothesis stability, which has the lowest variance, is judged.",
    scales={
        "small": {
            **SCALES["small"],
            "device": "cpu",
            "num_draws": 2,
            "num_removed": 25,
        },
        "full": {
            **SCALES["full"],
            "device": "auto",
            "num_draws": 10,
            "num_removed": 100,
        },
    },
    cells=lambda settings: grid(variant=VARIANTS, draw=range(settings["num_draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("MNIST",),
)

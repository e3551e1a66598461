"""Nets that learn labels, half of them random, at several rates, followed to one loss.

Clean labels, or He initialisation, show no growth of curvature at this size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.data import CIFAR10, Digits
from lit_resnorm.measures.fisher import Examinations
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.drawing import Look
from lit_resnorm.papers.item import Row, Settings, cell_seed
from lit_resnorm.papers.training import examples, quiet
from lit_resnorm.population import Population

__all__ = ["LOOKS", "SCALES", "LabelledBatch", "trajectories"]

LabelledBatch = tuple[Tensor, Tensor]

SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "data": "Digits",
        "num_train": 640,
        "random_labels": 0.5,
        "width": 96,
        "hidden": 3,
        "batch_size": 32,
        "rates": [0.05, 0.1, 0.4],
        "every": 100,
        "loss": 0.35,
        "max_steps": 4000,
        "num_batches": 10,
        "size_of_batches": 64,
        "draws": 1,
    },
    "full": {
        "data": "CIFAR10",
        "num_train": 5000,
        "random_labels": 0.5,
        "width": 512,
        "hidden": 3,
        "batch_size": 128,
        "rates": [0.01, 0.03, 0.1],
        "every": 200,
        "loss": 0.35,
        "max_steps": 40_000,
        "num_batches": 25,
        "size_of_batches": 128,
        "draws": 5,
    },
}

LOOKS = (
    Look("#D55E00", "o", (0, (1, 1.2)), "lowest rate"),
    Look("#0072B2", "^", (0, (5, 1.5)), "middle rate"),
    Look("#000000", "D", (0, (8, 2)), "highest rate"),
)

Measure = Callable[[nn.Module, LabelledBatch, Examinations], Mapping[str, float]]
"""Takes a net, the training set, and what is known of it; returns a row."""


def trajectories(
    settings: Settings, draw: int, seed: int, measure: Measure
) -> list[Row]:
    """Return what is measured of a net at each rate, up to the loss of the settings.

    The rates are members of one population: the same weights, batches and labels.

    Args:
        settings: Of `SCALES`.
        draw: Number of the draw of weights, labels and batches.
        seed: Base seed.
        measure: Measures a net on the training set.

    Returns:
        Rows of `rate`, `step`, `loss`, and what is measured.
    """
    batch = _data(settings, cell_seed(seed, "data", draw))
    rates = settings["rates"]
    torch.manual_seed(cell_seed(seed, "net", draw))
    population = Population(
        partial(make_net, settings, tuple(batch[0].shape[1:])),
        [{"lr": rate, "seed": cell_seed(seed, "net", draw)} for rate in rates],
    )
    order = torch.Generator().manual_seed(cell_seed(seed, "batches", draw))
    loader = DataLoader(
        TensorDataset(*batch), settings["batch_size"], shuffle=True, generator=order
    )
    followed = _RatesFollower(settings, batch, measure)
    with quiet():
        trainer = L.Trainer(
            max_steps=settings["max_steps"],
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=[followed],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(population, loader)
    return followed.rows


def make_net(settings: Settings, in_shape: tuple[int, ...]) -> LitClassifier:
    """Return a ReLU net with torch's default initialisation."""
    width = settings["width"]
    num_inputs = int(torch.tensor(in_shape).prod())
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(settings["hidden"]):
        layers += [nn.Linear(num_inputs, width), nn.ReLU()]
        num_inputs = width
    layers.append(nn.Linear(width, 10))
    sgd = partial(torch.optim.SGD, lr=1.0)
    return LitClassifier(nn.Sequential(*layers), optimizer=sgd)


def _data(settings: Settings, seed: int) -> LabelledBatch:
    kind = Digits if settings["data"] == "Digits" else CIFAR10
    options = {"num_train": settings["num_train"], "num_val": 0, "seed": seed}
    x, y = examples(kind(**options), "train")
    noise = torch.Generator().manual_seed(seed)
    is_random = torch.rand(len(y), generator=noise) < settings["random_labels"]
    drawn = torch.randint(10, y.shape, generator=noise)
    return (x - x.mean()) / x.std(), torch.where(is_random, drawn, y)


class _RatesFollower(Callback):
    """Measures each member until its training loss comes below the settings'.

    Attributes:
        rows: What was measured.
    """

    def __init__(
        self, settings: Settings, batch: LabelledBatch, measure: Measure
    ) -> None:
        self.rows: list[Row] = []
        self._settings, self._batch, self._measure = settings, batch, measure
        self._open = {*range(len(settings["rates"]))}
        self._known = Examinations()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure the weights that the coming step sees."""
        del batch, batch_idx
        if trainer.global_step % self._settings["every"] == 0:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, population: Any) -> None:
        x, y = self._batch
        with torch.no_grad():
            outputs_MBC = population(x)
        for member in sorted(self._open):
            loss = nn.functional.cross_entropy(outputs_MBC[member], y)
            net = make_net(self._settings, tuple(x.shape[1:]))
            net.load_state_dict(population.member_state_dict(member))
            row = self._measure(net, self._batch, self._known)
            rate, step = self._settings["rates"][member], trainer.global_step
            self.rows.append({"rate": rate, "step": step, "loss": float(loss), **row})
            if not float(loss) > self._settings["loss"]:
                self._open.discard(member)
        trainer.should_stop = not self._open

"""The training of ten-layer nets on few digits that Figures 4, 5 and 6 share."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_resnorm.data import MNIST, Digits
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.furusho2020.source import build, num_blocks
from lit_resnorm.papers.item import Settings, cell_seed
from lit_resnorm.papers.training import examples

__all__ = ["LABELS", "SCALES", "VARIANTS", "digits", "net"]

VARIANTS = ("mlp", "res1", "res2")
LABELS = {"small": "digits", "full": "MNIST"}
SCALES = {
    "small": {
        "data": "Digits",
        "num_train": 200,
        "num_test": 360,
        "width": 64,
        "num_weights": 10,
        "num_steps": 240,
        "momentum": 0.9,
        "rates": {"mlp": 1e-2, "res1": 3e-4, "res2": 1e-3},
    },
    "full": {
        "data": "MNIST",
        "num_train": 1000,
        "num_test": 10_000,
        "width": 784,
        "num_weights": 10,
        "num_steps": 1000,
        "momentum": 0.9,
        "rates": {"mlp": 1e-2, "res1": 3e-5, "res2": 1e-4},
    },
}


def digits(settings: Settings, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training inputs and labels, then those of the test set."""
    kind = Digits if settings["data"] == "Digits" else MNIST
    data = kind(
        num_train=settings["num_train"],
        num_val=0,
        num_test=settings["num_test"],
        seed=seed,
    )
    return *examples(data, "train"), *examples(data, "test")


def net(settings: Settings, variant: str, draw: int, seed: int) -> LitClassifier:
    """Return a variant with its optimizer; the same draw starts all from like weights.

    Args:
        settings: Of `SCALES`.
        variant: `mlp`, `res1` or `res2`.
        draw: Number of the initialisation.
        seed: Base seed.
    """
    torch.manual_seed(cell_seed(seed, "net", draw))
    shape = (1, 8, 8) if settings["data"] == "Digits" else (1, 28, 28)
    rate, momentum = settings["rates"][variant], settings["momentum"]
    return build(
        variant,
        num_blocks(variant, settings["num_weights"]),
        settings["width"],
        in_shape=shape,
        num_classes=10,
        optimizer=lambda params: torch.optim.SGD(params, lr=rate, momentum=momentum),
    )

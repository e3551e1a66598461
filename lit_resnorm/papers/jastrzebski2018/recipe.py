"""The training that the items share, and what is measured of its nets."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

import lit_resnorm.data as data_modules
from lit_resnorm import modules
from lit_resnorm.measures.iterative_inference import (
    BlockInference,
    IterativeInference,
    iterative_inference,
)
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.drawing import Look
from lit_resnorm.papers.item import Cell, Row, Settings, cell_seed, grid
from lit_resnorm.papers.training import examples, quiet

__all__ = [
    "DATA",
    "DIFFERS",
    "END",
    "SCALES",
    "START",
    "draws",
    "inference_rows",
    "trained",
]

DATA = ("CIFAR10",)
START = Look("#009E73", "s", (0, (5, 1.5, 1, 1.5)), "before training")
END = Look("#0072B2", "^", (0, (5, 1.5)), "trained")
SCALES = {
    "small": {
        "device": "cpu",
        "data": "Digits",
        "model": "LitResNetBN",
        "options": {"depth": 10, "width": 64},
        "batch_size": 64,
        "epochs": 15,
        "rate": 0.05,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "milestones": [],
        "num_examples": 1000,
        "draws": 3,
    },
    "full": {
        "device": "auto",
        "data": "CIFAR10",
        "model": "LitPreactResNet",
        "options": {"stages": [18, 18, 18], "width": 16},
        "batch_size": 128,
        "epochs": 300,
        "rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "milestones": [80, 120, 200, 240],
        "num_examples": 1000,
        "draws": 1,
    },
}
DIFFERS = (
    "Small: ten fully connected blocks with batch norm on digits, plain SGD for 15 "
    "epochs: with momentum the loss is used up, the gradients of half of the examples "
    "are below 1e-12 in float32, and signs tell nothing. Statistics of batch norm are "
    "running ones."
)


def draws(settings: Settings) -> list[Cell]:
    """Return one cell a training."""
    return grid(draw=range(settings["draws"]))


def trained(
    settings: Settings, seed: int, draw: int
) -> tuple[LitClassifier, LitClassifier, dict[str, tuple[Tensor, Tensor]]]:
    """Return a net before and after its training, and examples of both splits.

    Args:
        settings: As in `SCALES`.
        seed: Base seed.
        draw: Number of the training.
    """
    key = cell_seed(seed, "training", draw)
    data: Any = getattr(data_modules, settings["data"])(
        batch_size=settings["batch_size"], num_workers=0, seed=key
    )
    torch.manual_seed(key)
    module = _module(settings, data)
    start = _module(settings, data)
    start.load_state_dict(module.state_dict())
    with quiet():
        trainer = L.Trainer(
            max_epochs=settings["epochs"],
            accelerator="auto" if settings["device"] == "auto" else "cpu",
            devices=1,
            logger=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    num = settings["num_examples"]
    splits = {
        split: tuple(part[:num].cpu() for part in examples(data, split))
        for split in ("train", "test")
    }
    return start.cpu().eval(), module.cpu().eval(), splits  # type: ignore[return-value]


def _module(settings: Settings, data: Any) -> LitClassifier:
    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            params,
            settings["rate"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
        )

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, settings["milestones"])

    make = getattr(modules, settings["model"])
    return make(
        **settings["options"],
        in_shape=tuple(data.input_shape),
        num_classes=data.num_classes,
        optimizer=optimizer,
        lr_scheduler=schedule,
    )


def inference_rows(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return what each block does, before and after training, on both splits."""
    start, end, splits = trained(settings, seed, cell["draw"])
    rows = []
    for when, module in (("start", start), ("end", end)):
        for split, batch in splits.items():
            found = iterative_inference(
                module, batch, forward=network_output, norm_mode="eval"
            )
            rows += [
                {"when": when, "split": split, "block": block, **_row(found, each)}
                for block, each in enumerate(found.blocks, 1)
            ]
    return rows


def _row(found: IterativeInference, block: BlockInference) -> Row:
    numbers = {
        "accuracy": found.whole.accuracy,
        "cosine": block.cosine,
        "excluded": block.excluded,
        "ratio": block.ratio,
        "readout": block.readout and block.readout.accuracy,
        "drop": block.drop and block.drop.accuracy,
    }
    return {
        name: None if value is None else float(value) for name, value in numbers.items()
    }

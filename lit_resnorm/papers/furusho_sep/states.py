"""Hidden states of random nets, and what two examples have in common there."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from lit_resnorm.data import MNIST
from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.papers.furusho2020.source import build
from lit_resnorm.papers.item import Row, Settings, cell_seed
from lit_resnorm.papers.summaries import Curve, curve, where
from lit_resnorm.papers.training import device, examples
from lit_resnorm.theory import coactivation, fisher_theory, kernel_angles

__all__ = ["SCALES", "VARIANTS", "of_variant", "pair_rows"]

VARIANTS = ("mlp", "res2", "res2_bn")
SCALES = {
    "small": {
        "device": "cpu",
        "data": "gauss",
        "width": 500,
        "num_examples": 100,
        "depth": 10,
        "draws": 5,
    },
    "full": {
        "device": "auto",
        "data": "MNIST",
        "width": 784,
        "num_examples": 1000,
        "depth": 10,
        "draws": 10,
    },
}


def _inputs(settings: Settings, draw: int, seed: int) -> Tensor:
    num, width = settings["num_examples"], settings["width"]
    key = cell_seed(seed, "inputs", draw)
    if settings["data"] == "gauss":
        return gaussian_inputs("gauss", [num], width, key)[0].float()
    data = MNIST(
        classes=[0, 1], num_train=num, num_val=0, num_test=1, whiten=True, seed=key
    )
    x_ND = examples(data, "train")[0]
    return x_ND * (width**0.5 / x_ND.norm(dim=1, keepdim=True))


def pair_rows(settings: Settings, variant: str, draw: int, seed: int) -> list[Row]:
    """Return mean angles, co-activations and their theory by block, over all pairs.

    Rows have `depth` (blocks passed) and `angle` (radians); those of a hidden layer
    also `coactivation`, measured, `from_angle`, its theory at the angle of the
    pre-activations, `spread`, the mean distance between the two by pair, `from_input`,
    the theory at the angle of the block's input, and `recursion`, the theory at the
    angles that the kernels of this batch, centred by batch norm, should have.
    """
    x_ND = _inputs(settings, draw, seed).to(device(settings))
    torch.manual_seed(cell_seed(seed, "weights", draw))
    module = build(
        variant,
        settings["depth"],
        settings["width"],
        in_shape=tuple(x_ND.shape[1:]),
        num_classes=1,
    ).to(x_ND.device)
    rows: dict[int, Row] = {}
    own = _recursion(settings, variant, x_ND)
    upper = torch.triu(torch.ones(len(x_ND), len(x_ND)), 1).bool().to(x_ND.device)

    def tap(block: int, name: str, value: Tensor) -> None:
        row = rows.setdefault(block, {"depth": block})
        if name == "in":
            angles = kernel_angles(value.double() @ value.double().T)[upper]
            row["angle"] = float(angles.mean())
            row["from_input"] = float(coactivation(angles).mean())
            row["recursion"] = own[block]
        elif name == "norm1":
            angles = kernel_angles(value.double() @ value.double().T)[upper]
            on_ND = (value > 0).double()
            both = (on_ND @ on_ND.T / value.shape[1])[upper]
            expected = coactivation(angles)
            row["coactivation"] = float(both.mean())
            row["from_angle"] = float(expected.mean())
            row["spread"] = float((both - expected).abs().mean())
        elif name == "out":
            rows.setdefault(block + 1, {"depth": block + 1})["angle"] = _mean_angle(
                value, upper
            )

    with untouched(module) as run, torch.no_grad():
        run(lambda: module.net(x_ND, tap))
    return list(rows.values())


def _recursion(settings: Settings, variant: str, x_ND: Tensor) -> list[float]:
    """Return the co-activation that the kernels of a batch should have, by block."""
    x_ND = x_ND.double().cpu()
    width, depth = settings["width"], settings["depth"]
    theory = fisher_theory(variant, x_ND @ x_ND.T / x_ND.shape[1], depth, width)
    upper_NN = torch.triu(torch.ones(len(x_ND), len(x_ND)), 1).bool()
    found = []
    for kernel_NN in theory.kernels[:-1]:
        if variant == "res2_bn":  # which takes the mean over the batch out
            mean_N = kernel_NN.mean(0)
            kernel_NN = kernel_NN - mean_N[:, None] - mean_N + mean_N.mean()
        found.append(float(coactivation(kernel_angles(kernel_NN)[upper_NN]).mean()))
    return found


def _mean_angle(h_ND: Tensor, upper_NN: Tensor) -> float:
    h_ND = h_ND.double()
    return float(kernel_angles(h_ND @ h_ND.T)[upper_NN].mean())


def of_variant(curves: pd.DataFrame, variant: str, name: str) -> Curve:
    """Return a quantity of one variant over draws, by depth."""
    return curve(where(curves, variant=variant), "depth", name)

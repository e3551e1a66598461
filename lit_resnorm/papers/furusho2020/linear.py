"""Deep linear nets without read-out, and what happens to them along a training."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.modules import LitClassifier
from lit_resnorm.nets import Net
from lit_resnorm.papers.furusho2020.source import build, num_blocks
from lit_resnorm.papers.item import (
    Row,
    Settings,
    cell_seed,
)
from lit_resnorm.theory import log_pl_constant

__all__ = [
    "LOG10",
    "VARIANTS",
    "PLPath",
    "classifier",
    "linear_blocks",
    "log_mu",
    "regression",
]

VARIANTS = ("mlp", "res1", "res2")
LOG10 = math.log(10)


def linear_blocks(
    variant: str, settings: Settings, gain: float, seed: int
) -> nn.Module:
    """Return the blocks of a linear net, without its read-out, in float64."""
    torch.manual_seed(seed)
    width = settings["width"]
    depth = num_blocks(variant, settings["num_weights"])
    module = build(
        variant, depth, width, in_shape=(width,), activation="linear", gain=gain
    )
    return nn.Sequential(*cast(Net, module.net).blocks).double()


def regression(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Return Gaussian inputs and a linear teacher's outputs, float64.

    The teacher is `I + G / 2`, G of entries of variance 1 / width: a map that each of
    the three nets can reach.
    """
    width = settings["width"]
    key = cell_seed(seed, "inputs")
    (x_ND,) = gaussian_inputs("gauss", [settings["num_examples"]], width, key)
    generator = torch.Generator().manual_seed(cell_seed(seed, "teacher"))
    drawn_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return x_ND, x_ND + x_ND @ drawn_DD / (2 * math.sqrt(width))


def log_mu(variant: str, net: nn.Module, x_ND: Tensor) -> float:
    """Return the natural logarithm of the PL constant at the net's weights."""
    covariance_DD = x_ND.T @ x_ND / len(x_ND)
    return float(log_pl_constant(variant, list(net.parameters()), covariance_DD))


class PLPath(Callback):
    """Notes loss, squared gradient, PL constant and weights at every step.

    Args:
        variant: For the PL constant.
        x_ND: All inputs.
        keep_weights: Whether weights are kept, for distances along the path.
    """

    def __init__(
        self, variant: str, x_ND: Tensor, *, keep_weights: bool = False
    ) -> None:
        self.variant, self.x_ND, self.keep_weights = variant, x_ND, keep_weights
        self.rows: list[Row] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Note the gradient, and the constant at the weights it was taken at."""
        del optimizer
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        squared = math.fsum(float(g.square().sum()) for g in grads)
        net = cast(LitClassifier, pl_module).net
        self.rows.append(
            {
                "step": trainer.global_step,
                "squared_gradient": squared,
                "log10_mu": log_mu(self.variant, net, self.x_ND) / LOG10,
            }
        )
        if self.keep_weights:
            flat = [p.detach().flatten() for p in pl_module.parameters()]
            self.weights.append(torch.cat(flat))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the loss that the step saw."""
        del trainer, pl_module, batch, batch_idx
        self.rows[-1]["loss"] = float(outputs["loss"])


def classifier(net: nn.Module, optimizer: str, lr: float) -> LitClassifier:
    """Return the module that trains a linear net on squared distances."""
    kind = getattr(torch.optim, optimizer)
    return LitClassifier(net, loss="mse", optimizer=lambda params: kind(params, lr=lr))

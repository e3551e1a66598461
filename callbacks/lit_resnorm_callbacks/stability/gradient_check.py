"""Sees whether a run steps with the gradient of its examples' losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_resnorm.measures.passes.untouched import Reduce


class GradientCheck:
    """Compares the gradient of one step with that of the losses of its batches.

    Hooks on parameters, noise, a penalty without a value, or whatever else changes
    gradients between the loss and the optimizer makes them differ.

    Args:
        name: The probe's name, for the message.
        trainer: The trainer.

    Attributes:
        buffers: The model's buffers before the pass in hand.
        used: Gradients with which the run has stepped, by name.
    """

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}
        self._name = name
        # The mean over ranks and accumulated batches.
        self._scale = 1 / trainer.world_size / trainer.accumulate_grad_batches
        self._half = "16" in str(trainer.precision)
        self._expected: dict[str, Tensor] = {}
        self._holds = True

    def restart(self, *, holds: bool) -> None:
        """Begin anew; where earlier gradients stay, nothing is compared."""
        self._expected = {}
        self._holds = holds

    def keep_buffers(self, module: nn.Module) -> None:
        """Keep the buffers with which a batch's forward pass is about to begin."""
        self.buffers = {n: b.detach().clone() for n, b in module.named_buffers()}

    def add(self, grads: dict[str, Tensor]) -> None:
        """Add the gradient of the mean loss of one batch of the step."""
        for name, grad in grads.items():
            part = grad * self._scale
            self._expected[name] = self._expected.get(name, 0) + part

    def compare(
        self, clip: Callable[[dict[str, Tensor]], None], reduce: Reduce
    ) -> None:
        """Compare what was added with what the run has used.

        Args:
            clip: Clips stacked gradients in place, as the run's are clipped.
            reduce: Sums over ranks.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        if not self._holds:
            return
        expected: dict[str, Tensor] = {}
        for name, used in self.used.items():
            own = self._expected.get(name, torch.zeros_like(used))
            expected[name] = reduce(own)[None]
        clip(expected)
        size = apart = torch.zeros((), dtype=torch.float64)
        for name, used in self.used.items():
            size = size + used.double().square().sum().cpu()
            difference = (used - expected[name][0]).double()
            apart = apart + difference.square().sum().cpu()
        # Both are rounded alike but in the order of sums; half the digits are spared.
        dtypes = {used.dtype for used in self.used.values()}
        dtypes |= {torch.bfloat16} if self._half else set()
        tolerance = max((torch.finfo(d).eps for d in dtypes), default=0.0) ** 0.5
        if size.isfinite() and apart > tolerance**2 * size:
            share = (apart / size).sqrt()
            raise ValueError(
                f"{self._name}: the run steps with a gradient that differs by"
                f" {share:.1%} from that of its examples' losses (a hook on gradients,"
                " noise, a penalty?), which twins can't follow"
            )

"""Full-batch steps at several rates: where does training become unstable?

Dimensions: K members, one a rate; B examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_resnorm.diagnose.descent import Descent
from lit_resnorm.diagnose.report import StableRates, Trial
from lit_resnorm.diagnose.subject import Progress, Subject, silent
from lit_resnorm.measures.copies.copies import Copies, Losses, ModelFunction
from lit_resnorm.measures.copies.first_pass import FirstPass, run_first_pass
from lit_resnorm.measures.passes.untouched import untouched

NUM_STEPS = 60
"""As in Figure 8 of Furusho & Ikeda."""

_LAST_STEPS = 5
"""Steps over which the last loss is averaged: it may oscillate."""

_GRID = range(-2, 11)
"""Powers of sqrt 2 around the bound: from half of it to 32 times."""

_BEYOND = range(11, 21)
"""Where all of these are stable: up to 1024 times."""

_GRID_WITHOUT_BOUND = range(-12, 13, 2)
"""Powers of sqrt 2 around the configured rate: from a 64th to 64 times."""

_TOO_LARGE = 1000.0
"""Times the first loss, or 1, at which a copy has diverged, as in that figure."""

_MEMORY = 2**30
_SIZES_OF_STATE = 5
"""Weights, gradients and an optimizer's state, in sizes of the weights."""


class Trials:
    """Trains copies of a network on one batch, each at a rate of its own.

    Copies train in mode train, batch norm on the statistics of the batch, each by an
    optimizer of the configured class, with its settings; the network itself is
    untouched. Copies run in one vectorised pass where that gives the same losses.

    Args:
        subject: The network, its batch and its loss.
        descent: Its optimizer.
    """

    def __init__(self, subject: Subject, descent: Descent) -> None:
        self.module, self.batch, self.descent = subject.module, subject.batch, descent
        loss, forward = subject.loss, subject.forward
        self.losses: Losses = lambda model, rows: loss.of_examples(
            model, forward(model, rows), rows
        )
        self.function = ModelFunction(self.module, self.losses)

    def run_first_pass(self) -> FirstPass:
        """Return what one pass of the network in mode train shows.

        Raises:
            ValueError: If there isn't one loss for each example.
        """
        with untouched(self.module, norm_mode="eval"):
            self.module.train()
            return run_first_pass(self.module, self.losses, self.batch)

    def run(
        self,
        rates: Sequence[float],
        bound: float | None,
        *,
        num_steps: int = NUM_STEPS,
        first_pass: FirstPass | None = None,
        stage: str = "rates",
        progress: Progress = silent,
    ) -> list[Trial]:
        """Return a trial for each rate.

        Args:
            rates: Learning rates.
            bound: What `in_bounds` counts in; None where there is no bound.
            num_steps: Steps of each.
            first_pass: Of an earlier call.
            stage: What progress is told.
            progress: Told how many steps are done, of how many.

        Raises:
            ValueError: If the optimizer can't step on copies.
        """
        shown = self.run_first_pass() if first_pass is None else first_pass
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        together = max(1, _MEMORY // (shown.num_bytes + _SIZES_OF_STATE * weights + 1))
        size = min(len(rates), together) if shown.vectorisable else 1
        parts = [rates[at : at + size] for at in range(0, len(rates), size)]
        trials: list[Trial] = []
        for place, part in enumerate(parts):

            def tell(step: int, place: int = place) -> None:
                progress(stage, place * num_steps + step, len(parts) * num_steps)

            with untouched(self.module, norm_mode="eval"):
                self.module.train()
                losses_SK = self._losses(part, num_steps, tell)
            trials += [
                _trial(rate, None if bound is None else rate / bound, losses_S)
                for rate, losses_S in zip(part, losses_SK.T.tolist(), strict=True)
            ]
        return trials

    def _losses(
        self, rates: Sequence[float], num_steps: int, tell: Callable[[int], None]
    ) -> Tensor:
        """Return the losses before each step and after the last, shape `(S + 1, K)`."""
        own = {
            p for group in self.descent.optimizer.param_groups for p in group["params"]
        }
        trained = [
            name
            for name, p in self.module.named_parameters()
            if p.requires_grad and p in own
        ]
        if not trained:
            raise ValueError("the optimizer trains no parameter of the module")
        copies = Copies(self.module, trained, len(rates))
        # As the network's own weights lie in memory: rounding follows the layout.
        weights = {
            n: stack.contiguous().requires_grad_() for n, stack in copies.params.items()
        }
        rows_NK = {name: stack.detach().unbind() for name, stack in weights.items()}
        optimizers = [
            self.descent.on_copies(
                {copies.originals[name]: rows_K[k] for name, rows_K in rows_NK.items()},
                rate,
            )
            for k, rate in enumerate(rates)
        ]
        going_K = copies.finite
        losses_SK = []
        for step in range(num_steps + 1):
            losses_K = self._mean_losses(weights | copies.buffers, len(rates))
            losses_SK.append(losses_K.detach())
            tell(step)
            going_K &= losses_K <= _TOO_LARGE * losses_SK[0].clamp_min(1.0)
            if step == num_steps or not bool(going_K.any()):
                break
            grads = torch.autograd.grad(
                losses_K.sum(), [*weights.values()], allow_unused=True
            )
            for rows_K, grad in zip(rows_NK.values(), grads, strict=True):
                for k, row in enumerate(rows_K):
                    row.grad = None if grad is None else grad[k]
            for optimizer in optimizers:
                optimizer.step()
        return torch.stack(losses_SK)

    def _mean_losses(self, weights: dict[str, Tensor], num: int) -> Tensor:
        if num == 1:
            only = {name: stack[0] for name, stack in weights.items()}
            return self.function.with_weights(only, self.batch).mean().reshape(1)
        each = self.function.for_each(weights, self.batch)
        return each.reshape(num, -1).mean(1)


def stable_rates(
    trials: Trials,
    reference: float,
    norm_mode: str,
    *,
    progress: Progress = silent,
) -> StableRates:
    """Return which rates around a reference are stable.

    Of gradient descent the reference is its bound: a grid of factors sqrt 2 from half
    of it to 32 times, and to 1024 times where all of these are stable. Of other
    optimizers it is the configured rate: factors of 2 from a 64th to 64 times.

    Args:
        trials: The network and its batch.
        reference: The rate bound, or the configured rate.
        norm_mode: How the bound's curvature was measured.
        progress: Told how many steps are done, of how many.
    """
    shown = trials.run_first_pass()
    binding = trials.descent.binding
    bound = reference if binding else None
    done: list[Trial] = []
    for grid in (_GRID, _BEYOND) if binding else (_GRID_WITHOUT_BOUND,):
        rates = [reference * 2 ** (power / 2) for power in grid]
        done += trials.run(rates, bound, first_pass=shown, progress=progress)
        if not all(trial.stable for trial in done):
            break
    return StableRates(trials.descent.words, norm_mode, bound, NUM_STEPS, tuple(done))


def _trial(rate: float, in_bounds: float | None, losses: list[float]) -> Trial:
    first, tail = losses[0], losses[-_LAST_STEPS:]
    # a net that exploded may come back dead, at the loss of a constant output
    far = not max(losses) <= _TOO_LARGE * max(first, 1.0)
    finite = all(math.isfinite(loss) for loss in losses)
    if far or not finite:
        worst = math.nan if any(math.isnan(loss) for loss in losses) else max(losses)
        return Trial(rate, in_bounds, first, worst, stable=False, highest=worst)
    last = sum(tail) / len(tail)
    return Trial(rate, in_bounds, first, last, last <= first, highest=max(losses))

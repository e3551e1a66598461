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

_TOO_LARGE = 1000.0
"""Times the first loss, or 1, at which a copy has diverged, as in that figure."""

_MEMORY = 2**30


class Trials:
    """Trains copies of a network on one batch, each at a rate of its own.

    Copies train in mode train, batch norm on the statistics of the batch, by SGD with
    momentum, dampening, Nesterov and decay as configured; the network itself is
    untouched. Copies run in one vectorised pass where that gives the same losses.

    Args:
        subject: The network, its batch and its loss.
        descent: Momentum and the like; an adaptive optimizer's trials are plain
            gradient descent.
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
        bound: float,
        *,
        num_steps: int = NUM_STEPS,
        first_pass: FirstPass | None = None,
        stage: str = "rates",
        progress: Progress = silent,
    ) -> list[Trial]:
        """Return a trial for each rate.

        Args:
            rates: Learning rates.
            bound: What `in_bounds` counts in.
            num_steps: Steps of each.
            first_pass: Of an earlier call.
            stage: What progress is told.
            progress: Told how many steps are done, of how many.
        """
        shown = self.run_first_pass() if first_pass is None else first_pass
        together = max(1, _MEMORY // max(1, shown.num_bytes))
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
                _trial(rate, rate / bound, losses_S)
                for rate, losses_S in zip(part, losses_SK.T.tolist(), strict=True)
            ]
        return trials

    def _losses(
        self, rates: Sequence[float], num_steps: int, tell: Callable[[int], None]
    ) -> Tensor:
        """Return the losses before each step and after the last, shape `(S + 1, K)`."""
        trained = [n for n, p in self.module.named_parameters() if p.requires_grad]
        copies = Copies(self.module, trained, len(rates))
        # As the network's own weights lie in memory: rounding follows the layout.
        weights = {
            n: stack.contiguous().requires_grad_() for n, stack in copies.params.items()
        }
        rates_K = torch.tensor(rates, device=copies.finite.device)
        momenta: dict[str, Tensor] = {}
        going_K = copies.finite
        rows = []
        for step in range(num_steps + 1):
            losses_K = self._mean_losses(weights | copies.buffers, len(rates))
            rows.append(losses_K.detach())
            tell(step)
            going_K &= losses_K <= _TOO_LARGE * rows[0].clamp_min(1.0)
            if step == num_steps or not bool(going_K.any()):
                break
            grads = torch.autograd.grad(
                losses_K.sum(), [*weights.values()], allow_unused=True
            )
            with torch.no_grad():
                for (name, stack), grad in zip(weights.items(), grads, strict=True):
                    if grad is not None:
                        own = copies.originals[name]
                        self._update(name, own, stack, grad, momenta, rates_K)
        return torch.stack(rows)

    def _mean_losses(self, weights: dict[str, Tensor], num: int) -> Tensor:
        if num == 1:
            only = {name: stack[0] for name, stack in weights.items()}
            return self.function.with_weights(only, self.batch).mean().reshape(1)
        each = self.function.for_each(weights, self.batch)
        return each.reshape(num, -1).mean(1)

    def _update(
        self,
        name: str,
        parameter: Tensor,
        stack: Tensor,
        grad: Tensor,
        momenta: dict[str, Tensor],
        rates_K: Tensor,
    ) -> None:
        """Take the step that `torch.optim.SGD` takes, at each member's rate."""
        own = self.descent.settings.get(parameter)
        if own is None and self.descent.settings:
            return  # in no group: it isn't trained
        own = {**self.descent.group, "scale": 1.0} if own is None else own
        plain = not self.descent.binding
        momentum = 0.0 if plain else own["momentum"]
        if not plain and own["weight_decay"]:
            grad = grad + own["weight_decay"] * stack
        direction = grad
        if momentum:
            kept = momenta.get(name)
            new = (
                grad.clone()
                if kept is None
                else momentum * kept + (1 - own["dampening"]) * grad
            )
            momenta[name] = new
            direction = grad + momentum * new if own["nesterov"] else new
        rates = (rates_K * own["scale"]).to(stack.dtype)
        stack -= rates.view(-1, *[1] * (stack.ndim - 1)) * direction


def stable_rates(
    trials: Trials,
    bound: float,
    norm_mode: str,
    *,
    progress: Progress = silent,
) -> StableRates:
    """Return which rates on a grid of factors sqrt 2 around the bound are stable.

    From half the bound to 32 times, and to 1024 times where all of these are stable.

    Args:
        trials: The network and its batch.
        bound: The rate bound.
        norm_mode: How its curvature was measured.
        progress: Told how many steps are done, of how many.
    """
    shown = trials.run_first_pass()
    done: list[Trial] = []
    for grid in (_GRID, _BEYOND):
        rates = [bound * 2 ** (power / 2) for power in grid]
        done += trials.run(rates, bound, first_pass=shown, progress=progress)
        if not all(trial.stable for trial in done):
            break
    descent = trials.descent
    words = descent.words if descent.binding else "gradient descent"
    return StableRates(words, norm_mode, bound, NUM_STEPS, tuple(done))


def _trial(rate: float, in_bounds: float, losses: list[float]) -> Trial:
    first, tail = losses[0], losses[-_LAST_STEPS:]
    # a net that exploded may come back dead, at the loss of a constant output
    far = not max(losses) <= _TOO_LARGE * max(first, 1.0)
    finite = all(math.isfinite(loss) for loss in losses)
    if far or not finite:
        worst = math.nan if any(math.isnan(loss) for loss in losses) else max(losses)
        return Trial(rate, in_bounds, first, worst, stable=False)
    last = sum(tail) / len(tail)
    return Trial(rate, in_bounds, first, last, stable=last <= first)

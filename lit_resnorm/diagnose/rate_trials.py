"""The bound of the rate, and trying the configured rate and others around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_resnorm.diagnose.configured import Descent
from lit_resnorm.diagnose.measuring import curvature_of
from lit_resnorm.diagnose.progress import Progress
from lit_resnorm.diagnose.result import Curvature, Finding, StableRates, Trial
from lit_resnorm.diagnose.trials import Trials, stable_rates
from lit_resnorm.measures.losses import Loss
from lit_resnorm.measures.rehearsal import Rehearsal


@dataclass(frozen=True)
class Tried:
    """What trials at some rates showed.

    Attributes:
        trial: Of the configured rate; None where it wasn't tried.
        stable: Of rates around the bound; None where not asked for.
        notes: Why rates couldn't be tried.
    """

    trial: Trial | None = None
    stable: StableRates | None = None
    notes: tuple[Finding, ...] = ()


def curvature_and_rates(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    descent: Descent,
    *,
    forward: Callable[[nn.Module, Any], Any],
    check_rate: bool,
    told: Progress,
) -> tuple[Curvature | None, Tried, list[Finding]]:
    """Return the curvature, what trials at rates showed, and why there is neither."""
    curvature, notes = curvature_of(
        module, batch, loss, descent, forward=forward, told=told
    )
    if curvature is None:
        return None, Tried(), notes
    tried = tried_rates(
        module,
        batch,
        loss,
        descent,
        curvature,
        forward=forward,
        check_rate=check_rate,
        told=told,
    )
    return curvature, tried, [*notes, *tried.notes]


def tried_rates(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    descent: Descent,
    curvature: Curvature,
    *,
    forward: Callable[[nn.Module, Any], Any],
    check_rate: bool,
    told: Progress,
) -> Tried:
    """Return what steps at the configured rate show, where it passes its bound.

    With `check_rate` at the configured rate in any case, and at rates around the bound.
    """
    passes = curvature.binding and (curvature.ratio or 0) > 1
    if not (passes or check_rate):
        return Tried()
    if not curvature.lambda_max > 0:
        return Tried(notes=(_untried("there is no bound to begin from"),))
    if loss.function is None:
        return Tried(notes=(_untried(f"there is no loss ({loss.words})"),))
    trials = Trials(module, batch, loss, descent, forward)
    try:
        rehearsal = trials.rehearse()
    except (ValueError, RuntimeError) as error:
        return Tried(notes=(_untried(" ".join(str(error).split())),))
    trial = stable = None
    if curvature.binding and curvature.rate is not None:
        (trial,) = trials.run(
            [curvature.rate],
            curvature.bound,
            rehearsal=rehearsal,
            stage="steps at the rate",
            progress=told,
        )
    if check_rate:
        mode, bound = _train_bound(
            module, batch, loss, descent, curvature, rehearsal, forward
        )
        stable = stable_rates(trials, bound, mode, progress=told)
    return Tried(trial, stable)


def _train_bound(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    descent: Descent,
    curvature: Curvature,
    rehearsal: Rehearsal,
    forward: Callable[[nn.Module, Any], Any],
) -> tuple[str, float]:
    """Return the bound of the curvature that steps on a batch meet, and its mode."""
    if not rehearsal.coupled:
        return "frozen", descent.bound(curvature.lambda_max)
    found, _ = curvature_of(
        module, batch, loss, descent, forward=forward, norm_mode="train"
    )
    if found is None or not found.lambda_max > 0:
        return "frozen", descent.bound(curvature.lambda_max)
    return "train", found.bound


def _untried(reason: str) -> Finding:
    return Finding("rate_not_tried", "note", f"no rate was tried: {reason}")

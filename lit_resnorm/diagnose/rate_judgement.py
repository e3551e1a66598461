"""The verdict on the learning rate."""

from __future__ import annotations

from lit_resnorm.diagnose import advice
from lit_resnorm.diagnose.result import Curvature, Finding, StableRates, Trial
from lit_resnorm.diagnose.trials import NUM_STEPS

_SOURCE = f"{advice.FURUSHO}, Figure 8; bounds by momentum and decay derived here"


def rate_findings(
    curvature: Curvature, trial: Trial | None, stable: StableRates | None
) -> list[Finding]:
    """Return the verdict on the configured rate.

    The bound is that of a quadratic; a rate beyond it is a pathology where steps at it
    are unstable, and else a warning.

    Args:
        curvature: With the rate and its bound.
        trial: Steps at the configured rate, where it passes its bound.
        stable: Which rates are stable, where asked for.
    """
    if not curvature.lambda_max > 0:
        words = (
            f"no rate bound: lambda_max is {curvature.lambda_max:g}; the output is"
            " saturated, or no parameter moves it"
        )
        return [Finding("no_curvature", "note", words)]
    rate, ratio = curvature.rate, curvature.ratio
    if rate is None or ratio is None:
        return []
    if not curvature.binding:
        words = (
            f"no verdict on the rate {rate:.3g}: {curvature.optimizer} rescales its"
            f" gradients; gradient descent's bound is {curvature.bound:.3g}"
        )
        return [Finding("adaptive_optimizer", "note", words)]
    if ratio <= 1 and not (trial and not trial.stable):
        return []
    below = curvature.bound
    if stable is not None and stable.largest_stable is not None:
        below = stable.largest_stable.rate
    evidence = {"rate": rate, "bound": curvature.bound, "factor": ratio}
    if trial is None or trial.stable:
        words = (
            f"the rate {rate:.3g} is {ratio:.3g} times the bound of"
            f" {curvature.optimizer}, {curvature.bound:.3g}; {_outcome(trial)}"
        )
        name, severity = "rate_above_bound", "warning"
    else:
        words = (
            f"rate too high by a factor {rate / below:.3g}: {rate:.3g}, and"
            f" {_limit(curvature, below)}; {_outcome(trial)}"
        )
        name, severity = "rate_too_high", "pathology"
    if trial is not None:
        evidence |= {"first_loss": trial.first, "last_loss": trial.last}
    suggestions = (advice.below(below),)
    return [Finding(name, severity, words, evidence, suggestions, _SOURCE, "D")]


def _limit(curvature: Curvature, below: float) -> str:
    if below != curvature.bound:
        return f"the largest stable rate is {below:.3g}"
    return f"the bound of {curvature.optimizer} is {below:.3g}"


def _outcome(trial: Trial | None) -> str:
    if trial is None:
        return "it was not tried"
    how = "stable" if trial.stable else "unstable"
    return (
        f"{NUM_STEPS} full-batch steps at it are {how}, from loss {trial.first:.3g} to"
        f" {trial.last:.3g}"
    )

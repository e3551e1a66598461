"""The verdict on the learning rate: from its bound, and from steps that were tried."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_resnorm.diagnose import advice
from lit_resnorm.diagnose.curvature import CLEARLY, HARDLY, Tried
from lit_resnorm.diagnose.descent import Descent
from lit_resnorm.diagnose.rate_trials import NUM_STEPS
from lit_resnorm.diagnose.report import Curvature, Finding, Severity, Suggestion, Trial
from lit_resnorm.quantities.explanations import SATURATED, SLOW, ratio_in_words

LITTLE = 0.25
"""Share of what a smaller rate gains at which a rate gains too little."""

_OF_BOUNDS = f"{advice.FURUSHO}, Figure 8; bounds by momentum and decay derived here"
_OF_STEPS = "steps of copies of the network"


@dataclass(frozen=True)
class RateMeasurement:
    """What the verdict on the rate rests on.

    Attributes:
        descent: The optimizer, with the rate.
        curvature: With the bound; None where it could not be measured.
        tried: What steps showed.
        against: What to do about the network, where no rate helps.
    """

    descent: Descent
    curvature: Curvature | None = None
    tried: Tried = field(default_factory=Tried)
    against: tuple[Suggestion, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The rate over its own bound; None where there is none."""
        return None if self.curvature is None else self.curvature.ratio

    @property
    def is_judged(self) -> bool:
        """Whether the rate was compared with a bound of its own, or tried."""
        return self.tried.trial is not None or self.ratio is not None

    @property
    def best(self) -> Trial | None:
        """Of the rates tried beside it the stable one with the lowest loss."""
        steady = [other for other in self.tried.others if other.stable]
        return min(steady, key=lambda other: other.last, default=None)

    def finding(
        self,
        name: str,
        severity: Severity,
        words: str,
        suggestions: tuple[Suggestion, ...] = (),
    ) -> Finding:
        """Return a finding with the numbers behind it."""
        evidence: dict[str, float | None] = {"rate": self.descent.rate}
        if self.curvature is not None and self.ratio is not None:
            evidence |= {"bound": self.curvature.bound, "factor": self.ratio}
        trial = self.tried.trial
        if trial is not None:
            evidence |= {"first_loss": trial.first, "last_loss": trial.last}
        source = _OF_STEPS if self.ratio is None else _OF_BOUNDS
        return Finding(name, severity, words, evidence, suggestions, source, "D")

    @property
    def outcome(self) -> str:
        """What steps at the rate came to, in words."""
        trial = self.tried.trial
        if trial is None:
            return f"it was not tried: {self.tried.why_not}"
        how = "stable" if trial.stable else "unstable"
        over = f" over {trial.highest:.3g}" if trial.stable and trial.jumps else ""
        return (
            f"{NUM_STEPS} full-batch steps of {self.descent.words} at {trial.rate:.3g}"
            f" are {how}, from loss {trial.first:.3g}{over} to {trial.last:.3g}"
        )


def rate_findings(measured: RateMeasurement) -> list[Finding]:
    """Return the verdict on the configured rate, and what of it was not judged.

    A rate is too high where steps at it are unstable, or gain less than a quarter of
    what they gain at a smaller one. One beyond its bound, which is that of a quadratic,
    is else a warning.
    """
    descent, curvature, tried = measured.descent, measured.curvature, measured.tried
    found = []
    if curvature is not None and curvature.lambda_max < SATURATED:
        words = (
            f"saturated output: lambda_max is {curvature.lambda_max:.3g}, so the output"
            " doesn't change with the weights, and no rate is bounded"
        )
        found.append(Finding("saturated", "warning", words))
    if descent.num_others:
        words = (
            f"{descent.num_others} further optimizers were not looked at:"
            f" {descent.words} has the largest rate"
        )
        found.append(Finding("rate_not_judged", "note", words))
    if tried.trial is not None:
        return [*found, _of_trial(measured, tried.trial)]
    if measured.ratio is not None:
        return [*found, *_of_bound(measured, measured.ratio)]
    if tried.why_not:
        rate = "" if descent.rate is None else f" {descent.rate:.3g} of {descent.words}"
        words = f"the rate{rate} was not judged: {tried.why_not}"
        found.append(Finding("rate_not_judged", "note", words))
    return found


def _of_bound(measured: RateMeasurement, ratio: float) -> list[Finding]:
    """Return what the bound alone says of the rate."""
    if ratio > 1:
        return [_above_bound(measured, ratio)]
    if ratio >= SLOW:
        return []
    words = (
        f"rate too low: {measured.descent.rate:.3g} is {ratio:.2g} of its bound,"
        f" {ratio_in_words(ratio)}"
    )
    return [measured.finding("rate_too_low", "warning", words)]


def _of_trial(measured: RateMeasurement, trial: Trial) -> Finding:
    """Return what steps at the rate, and at others, say of it."""
    best, ratio = measured.best, measured.ratio
    gain = trial.first - trial.last
    most = 0.0 if best is None else best.first - best.last
    if not trial.stable:
        return _too_high(measured, trial)
    if best is not None and best.rate < trial.rate and gain < LITTLE * most:
        return _too_high(measured, trial)
    if trial.last > HARDLY * trial.first:
        if best is not None and best.last <= HARDLY * best.first:
            words = (
                f"rate too low: {measured.outcome}; at {best.rate:.3g} they end at"
                f" {best.last:.3g}"
            )
            return measured.finding("rate_too_low", "warning", words)
        rates = [trial.rate, *(other.rate for other in measured.tried.others)]
        words = (
            f"the loss hardly falls: {measured.outcome}, and no more at any rate from"
            f" {min(rates):.3g} to {max(rates):.3g}"
        )
        return measured.finding("loss_hardly_fell", "warning", words, measured.against)
    if ratio is not None and ratio > 1:
        return _above_bound(measured, ratio)
    if trial.jumps:
        words = f"the loss jumps at first: {measured.outcome}"
        suggestions = () if best is None else (advice.beginning_near(best.rate),)
        return measured.finding("rate_tried", "warning", words, suggestions)
    words = f"the rate holds: {measured.outcome}"
    return measured.finding("rate_tried", "note", words)


def _too_high(measured: RateMeasurement, trial: Trial) -> Finding:
    """Return that steps at the rate fail, and at which rate they don't."""
    curvature, best, grid = measured.curvature, measured.best, measured.tried.stable
    largest = None if grid is None else grid.largest_stable
    bound = None if curvature is None else curvature.bound
    limit, where, suggestions = None, "", measured.against
    if largest is not None and largest.rate < trial.rate:
        limit, suggestions = largest.rate, (advice.below(largest.rate),)
        where = f"the largest stable rate is {largest.rate:.3g}"
    elif best is not None and best.last < best.first and best.rate < trial.rate:
        limit, suggestions = best.rate, (advice.beginning_near(best.rate),)
        where = f"at {best.rate:.3g} they end at {best.last:.3g}"
    elif bound and bound < trial.rate:
        # no rate that was tried helps
        limit, suggestions = bound, (advice.below(bound), *measured.against)
    by = "" if limit is None else f" by a factor {trial.rate / limit:.3g}"
    words = "; ".join(filter(None, [f"rate too high{by}: {measured.outcome}", where]))
    if measured.ratio is not None and measured.ratio > 1:
        words += (
            f"; it is {measured.ratio:.3g} times the bound {bound:.3g}"
            f" ({ratio_in_words(measured.ratio)})"
        )
    return measured.finding("rate_too_high", "pathology", words, suggestions)


def _above_bound(measured: RateMeasurement, ratio: float) -> Finding:
    curvature = measured.curvature
    bound = curvature.bound if curvature is not None and curvature.bound else 0.0
    words = (
        f"the rate {measured.descent.rate:.3g} is {ratio:.3g} times the bound of"
        f" {measured.descent.words}, {bound:.3g} ({ratio_in_words(ratio)});"
        f" {measured.outcome}"
    )
    trial = measured.tried.trial
    learns = trial is not None and trial.last <= CLEARLY * trial.first
    suggestions = () if learns else (advice.below(bound),)
    return measured.finding("rate_above_bound", "warning", words, suggestions)

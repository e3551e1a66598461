"""The curvature and the rate bound from it, and what steps at rates around it show."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_resnorm.diagnose.descent import Descent
from lit_resnorm.diagnose.rate_trials import Trials, stable_rates
from lit_resnorm.diagnose.report import Curvature, Finding, StableRates, Trial
from lit_resnorm.diagnose.subject import Subject, silent
from lit_resnorm.measures.copies.first_pass import FirstPass
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.passes.batches import target_of
from lit_resnorm.measures.passes.progress import watched
from lit_resnorm.quantities.explanations import SATURATED

HARDLY = 0.98
"""Share of the first loss above which steps have hardly moved it."""

CLEARLY = 0.5
"""Share of the first loss up to which steps have clearly learned."""


@dataclass(frozen=True)
class Tried:
    """What trials at some rates showed.

    Attributes:
        trial: Of the configured rate; None where it wasn't tried.
        others: Of smaller and larger rates, where that one doesn't clearly learn.
        stable: Of rates around the bound; None where not asked for.
        why_not: Why rates couldn't be tried.
    """

    trial: Trial | None = None
    others: tuple[Trial, ...] = ()
    stable: StableRates | None = None
    why_not: str = ""


def curvature_and_rates(
    subject: Subject, descent: Descent, *, check_rate: bool
) -> tuple[Curvature | None, Tried, list[Finding]]:
    """Return the curvature, what trials at rates showed, and why there is no curvature.

    The curvature is that at frozen statistics of batch norm.
    """
    subject = replace(subject, norm_mode="frozen")
    curvature, notes = curvature_of(subject, descent)
    tried = tried_rates(subject, descent, curvature, check_rate=check_rate)
    return curvature, tried, notes


def curvature_of(
    subject: Subject, descent: Descent
) -> tuple[Curvature | None, list[Finding]]:
    """Return the Fisher matrix's spectrum with the rate bound; why not, in a note."""
    loss, norm_mode = subject.loss, subject.norm_mode
    if loss.likelihood is None:
        return None, [_no_curvature(loss.words)]
    weights, scale = loss.likelihood.curvature(target_of(subject.batch))
    subject.told("curvature", 0, 1)
    try:
        with watched(lambda _: subject.told("curvature", 0, 1)):
            found = fisher_spectrum(
                subject.module,
                subject.batch,
                output=loss.likelihood.output,
                norm_mode=norm_mode,
                num_eigenvalues=1,
                tol=1e-3,
                forward=subject.forward,
                weights=weights,
                loss_scale=scale,
                trace=norm_mode != "train",
            )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return None, [_no_curvature(" ".join(str(error).split()))]
    finally:
        subject.told("curvature", 1, 1)
    return (
        Curvature(
            lambda_max=found.max,
            lambda_mean=found.mean,
            bound=None if found.max < SATURATED else descent.bound(found.max),
            optimizer=descent.words,
            rate=descent.rate,
            loss=loss.likelihood.words,
        ),
        [],
    )


def tried_rates(
    subject: Subject,
    descent: Descent,
    curvature: Curvature | None,
    *,
    check_rate: bool,
) -> Tried:
    """Return what steps show at the configured rate, unless its bound says enough.

    That is a rate below the bound of its optimizer; any other is tried, and where it
    doesn't clearly learn, smaller and larger ones. With `check_rate` the configured
    rate in any case, and many around the bound.
    """
    bound = None if curvature is None else curvature.bound
    rate = descent.rate
    below = bound is not None and rate is not None and rate <= bound
    if not check_rate and (rate is None or below):
        return Tried()
    reference = bound if descent.binding else rate
    if check_rate and reference is None and rate is None:
        return Tried(why_not="there is no bound to begin from, and no configured rate")
    if subject.loss.function is None:
        return Tried(why_not=f"there is no loss ({subject.loss.words})")
    if descent.untriable:
        return Tried(why_not=descent.untriable)
    trials = Trials(subject, descent)
    trial, others, stable = None, [], None
    try:
        first_pass = trials.run_first_pass()
        shared = {"first_pass": first_pass, "progress": subject.told}
        if rate is not None:
            (trial,) = trials.run([rate], bound, stage="steps at the rate", **shared)
            if factors := _factors(trial):
                rates = [rate * factor for factor in factors]
                others = trials.run(rates, bound, stage="steps at others", **shared)
        if check_rate and reference is not None:
            mode = "frozen"
            if descent.binding:
                mode, reference = _train_bound(subject, descent, reference, first_pass)
            stable = stable_rates(trials, reference, mode, progress=subject.told)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        why = " ".join(str(error).split())
        return Tried(trial, tuple(others), why_not=why)
    return Tried(trial, tuple(others), stable)


def _factors(trial: Trial) -> list[float]:
    """Return factors of the rate that are tried beside it: none where it learns."""
    if not trial.stable:
        return [0.1, 0.01, 0.001]
    if trial.last > HARDLY * trial.first:
        return [1000.0, 100.0, 10.0, 0.1, 0.01]
    learns = trial.last <= CLEARLY * trial.first and not trial.jumps
    return [] if learns else [0.1, 0.01]


def _train_bound(
    subject: Subject, descent: Descent, frozen: float, first_pass: FirstPass
) -> tuple[str, float]:
    """Return the bound of the curvature that steps on a batch meet, and its mode."""
    if not first_pass.coupled:
        return "frozen", frozen
    in_training = replace(subject, norm_mode="train", told=silent)
    found, _ = curvature_of(in_training, descent)
    if found is None or found.bound is None:
        return "frozen", frozen
    return "train", found.bound


def _no_curvature(reason: str) -> Finding:
    return Finding("no_curvature", "note", f"no lambda_max and no rate bound: {reason}")

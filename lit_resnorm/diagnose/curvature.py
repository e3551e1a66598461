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
    subject: Subject, descent: Descent, *, check_rate: bool
) -> tuple[Curvature | None, Tried, list[Finding]]:
    """Return the curvature, what trials at rates showed, and why there is neither.

    The curvature is that at frozen statistics of batch norm.
    """
    subject = replace(subject, norm_mode="frozen")
    curvature, notes = curvature_of(subject, descent)
    if curvature is None:
        return None, Tried(), notes
    tried = tried_rates(subject, descent, curvature, check_rate=check_rate)
    return curvature, tried, [*notes, *tried.notes]


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
            bound=descent.bound(found.max),
            optimizer=descent.words,
            rate=descent.rate,
            binding=descent.binding,
            loss=loss.likelihood.words,
        ),
        [],
    )


def tried_rates(
    subject: Subject, descent: Descent, curvature: Curvature, *, check_rate: bool
) -> Tried:
    """Return what steps at the configured rate show, where it passes its bound.

    With `check_rate` at the configured rate in any case, and at rates around the bound.
    """
    passes = curvature.binding and (curvature.ratio or 0) > 1
    if not (passes or check_rate):
        return Tried()
    if not curvature.lambda_max > 0:
        return Tried(notes=(_untried("there is no bound to begin from"),))
    if subject.loss.function is None:
        return Tried(notes=(_untried(f"there is no loss ({subject.loss.words})"),))
    trials = Trials(subject, descent)
    try:
        first_pass = trials.run_first_pass()
    except (ValueError, RuntimeError) as error:
        return Tried(notes=(_untried(" ".join(str(error).split())),))
    trial = stable = None
    if curvature.binding and curvature.rate is not None:
        (trial,) = trials.run(
            [curvature.rate],
            curvature.bound,
            first_pass=first_pass,
            stage="steps at the rate",
            progress=subject.told,
        )
    if check_rate:
        mode, bound = _train_bound(subject, descent, curvature, first_pass)
        stable = stable_rates(trials, bound, mode, progress=subject.told)
    return Tried(trial, stable)


def _train_bound(
    subject: Subject, descent: Descent, curvature: Curvature, first_pass: FirstPass
) -> tuple[str, float]:
    """Return the bound of the curvature that steps on a batch meet, and its mode."""
    if not first_pass.coupled:
        return "frozen", descent.bound(curvature.lambda_max)
    in_training = replace(subject, norm_mode="train", told=silent)
    found, _ = curvature_of(in_training, descent)
    if found is None or not found.lambda_max > 0:
        return "frozen", descent.bound(curvature.lambda_max)
    return "train", found.bound


def _no_curvature(reason: str) -> Finding:
    return Finding("no_curvature", "note", f"no lambda_max and no rate bound: {reason}")


def _untried(reason: str) -> Finding:
    return Finding("rate_not_tried", "note", f"no rate was tried: {reason}")

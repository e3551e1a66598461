"""What is wrong in which run, and why, with the numbers that say so.

A finding speaks of any probe that declares the quantities that it weighs, whatever the
probe's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.compare.columns import stage_series, told
from lit_resnorm.compare.config import told_setting
from lit_resnorm.compare.divergence import broken_loss, run_has_diverged, training_loss
from lit_resnorm.compare.recorded import Recorded, Series
from lit_resnorm.quantities import find_declared
from lit_resnorm.quantities.explanations import SATURATED, SLOW, ratio_in_words

LABATIE = "Labatie 2019, arXiv 1811.03087"
FURUSHO = "Furusho & Ikeda 2020, doi 10.1017/ATSIP.2020.7"
STABILITY = "Bousquet & Elisseeff 2002, JMLR 2"

DEAD_IN_TRAINING = 0.5
"""Share of dead units in a layer from which on it is named."""

HARDLY_FELL = 0.98
"""Share of its first value above which a training loss has hardly fallen."""

UNMOVED = 0.05
"""Spread of a validation accuracy of at most a half that has not moved."""

OVERFIT = 0.5
"""Generalization gap, in units of the loss, from which on it is named."""


@dataclass(frozen=True)
class RunFinding:
    """One plain sentence about a run.

    Attributes:
        run: Its place; None: about all runs.
        severity: How bad it is.
        name: What it is about, in `lit_resnorm.quantities.explanations`.
        text: The sentence, with its numbers, without the run's name.
        source: The paper or measure behind it.
    """

    run: int | None
    severity: Literal["bad", "warn", "good", "info"]
    name: str
    text: str
    source: str


def findings_of(runs: Sequence[Recorded]) -> list[RunFinding]:
    """Return what the runs show, the worst first."""
    found = [
        RunFinding(place, severity, name, f"{text[0].upper()}{text[1:]}.", source)
        for place, run in enumerate(runs)
        for judge in _JUDGES
        for severity, name, text, source in judge(run)
    ]
    order = ("bad", "warn", "good", "info")
    return sorted(found, key=lambda one: order.index(one.severity))


_Said = Iterator[tuple[Literal["bad", "warn", "good", "info"], str, str, str]]
"""Severity, name, sentence and source."""


def _ending(run: Recorded) -> _Said:
    step = max((int(one.step[-1]) for one in run.series.values()), default=0)
    if run.status == "diverged":
        loss = training_loss(run)
        values = [] if loss is None else loss.value[np.isfinite(loss.value)].tolist()
        last = ""
        if values:
            last = f"; its last finite training loss was {values[-1]:.4g}"
        text = f"diverged by step {step}{last}"
        yield "bad", "diverged", text, "training loss not finite"
        return
    broken = broken_loss(run)
    if broken is not None:
        text = f"its {broken[0]} is not finite from step {broken[1]} on"
        yield "bad", "loss_not_finite", text, "a loss not finite at the end"
    if run.status == "failed":
        yield "bad", "failed", f"failed at step {step}", "exit status"
    elif run.status == "interrupted":
        text = f"did not come to its end (step {step})"
        yield "info", "interrupted", text, "no end was recorded"


def _learning(run: Recorded) -> _Said:
    if run_has_diverged(run):
        return
    accuracy = _poor_accuracy(run)
    if accuracy is not None:
        guess = 1 / run.config["model.num_classes"]
        text = (
            f"learned little: validation accuracy {accuracy:.3g}, a guess {guess:.3g}"
        )
        yield "bad", "learned_little", text, "validation accuracy at the end"
    flat = "" if accuracy is not None else _flat_accuracy(run)
    if flat:
        text = f"learned little: {flat}"
        yield "warn", "learned_little", text, "validation accuracy over training"
    loss = training_loss(run)
    if loss is None or len(loss.value) < 2:
        return
    first, last = _first_and_last(loss.value)
    steps = int(loss.step[-1]) - int(loss.step[0])
    numbers = f"from {first:.3g} to {last:.3g} over {steps} steps"
    if 0 < first * HARDLY_FELL < last:
        text = f"the training loss hardly fell: {numbers}"
        yield "warn", "loss_hardly_fell", text, "training loss"
    elif last < first and accuracy is None and not flat:
        found = stage_series(run, "val", "accuracy")
        at = "" if found is None else f"; validation accuracy {found.value[-1]:.3g}"
        yield "good", "learned", f"training loss {numbers}{at}", "training loss"


def _first_and_last(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth of the finite values."""
    finite = values[np.isfinite(values)]
    number = max(1, len(finite) // 10)
    return float(finite[:number].mean()), float(finite[-number:].mean())


def _poor_accuracy(run: Recorded) -> float | None:
    """Return the last validation accuracy where it is at most twice a guess's."""
    classes = run.config.get("model.num_classes")
    accuracy = stage_series(run, "val", "accuracy")
    if not isinstance(classes, int) or accuracy is None or int(accuracy.step[-1]) == 0:
        return None
    last = float(accuracy.value[-1])
    return last if classes > 2 and last <= 2 / classes else None


def _flat_accuracy(run: Recorded) -> str:
    """Return in words that the validation accuracy never moved, empty where it did.

    For runs whose number of classes isn't known.
    """
    accuracy = stage_series(run, "val", "accuracy")
    if accuracy is None or len(accuracy.value) < 3:
        return ""
    least, most = float(accuracy.value.min()), float(accuracy.value.max())
    if not (most - least <= UNMOVED and most <= 0.5):
        return ""
    ends = list(dict.fromkeys(f"{one:.3g}" for one in (least, most)))
    where = f"at {ends[0]}" if len(ends) == 1 else f"between {' and '.join(ends)}"
    return f"the validation accuracy stayed {where}"


def _pathology(run: Recorded) -> _Said:
    for probe in run.probes_with("pathology", "power_exponent"):
        words = told(run, run.quantities[f"{probe}/pathology"])
        if words is not None:
            yield from _pathology_of(run, probe, words)


def _pathology_of(run: Recorded, probe: str, word: str) -> _Said:
    poor = _poor_accuracy(run) is not None
    first, *_, last = [*word.split(" → ")] * 2
    removed = last == "none"
    later = "; training removed it" if removed else ""
    if last not in ("none", first):
        later = f"; at the end: {last}"
    if word == "none":
        text = f"no pathology of depth{_chi(run, probe, 'power')}"
        yield "good", "no_pathology", text, LABATIE
    elif first == "none":
        text = f"training led to the {last} pathology{_rank(run, probe, -1)}"
        yield "warn", "pathology_from_training", text, LABATIE
    elif first == "signal":
        text = (
            "signal pathology: examples collapse to a line with depth"
            f"{_rank(run, probe, 0)}{later}; skip connections with batch norm, or with"
            " small branches, prevent it"
        )
        yield "warn" if removed and not poor else "bad", "signal", text, LABATIE
    else:
        text = (
            "noise pathology: noise grows exponentially over the signal"
            f"{_chi(run, probe, 'log')}{later}; skip connections tame it to a power of"
            " depth"
        )
        yield "warn" if removed and not poor else "bad", "noise", text, LABATIE


def _rank(run: Recorded, probe: str, place: int) -> str:
    sites = run.depth.get(f"{probe}/effective_rank")
    if not sites:
        return ""
    value, step = sites[max(sites)].value[place], sites[max(sites)].step[place]
    if not np.isfinite(value):
        return ""
    return f" (effective rank {value:.3g} at {max(sites)}, step {step})"


def _chi(run: Recorded, probe: str, law: Literal["log", "power"]) -> str:
    name = {"log": "log_slope", "power": "power_exponent"}[law]
    series = run.series.get(f"{probe}/{name}")
    if series is None or not np.isfinite(series.value[0]):
        return ""
    value, step = series.value[0], series.step[0]
    if law == "power":
        return f" (sensitivity grows as depth to the {value:.2f}, step {step})"
    return f" (sensitivity times {np.exp(value):.3g} a layer, step {step})"


def _rate(run: Recorded) -> _Said:
    for probe in run.probes_with("rate_ratio", "rate", "rate_bound"):
        series = run.series.get(f"{probe}/rate_ratio")
        has_ratio = series is not None and bool(np.isfinite(series.value).any())
        why_not = _why_rate_not_judged(run, probe)
        if series is not None and has_ratio and not why_not:
            yield from _rate_of(run, probe, series)
        elif why_not and (has_ratio or f"{probe}/rate" in run.series):
            text = f"learning rate not judged: {why_not}"
            yield "info", "rate_not_judged", text, FURUSHO


def _why_rate_not_judged(run: Recorded, probe: str) -> str:
    """Return why the bound isn't that of the run's optimizer; empty where it is."""
    name = told_setting(run.config, "optimizer")
    named = name if isinstance(name, str) else "its optimizer"
    kind = run.series.get(f"{probe}/optimizer_kind")
    if kind is not None:
        is_other = not kind.value.any()
    elif isinstance(name, str):
        # of before the kind was recorded
        is_other = name.rpartition(".")[2] != "SGD"
    else:
        return "which optimizer took the steps isn't recorded"
    return f"{named} rescales its steps, and lambda_max bounds no rate of it" * is_other


def _rate_of(run: Recorded, probe: str, series: Series) -> _Said:
    ratio = float(np.nanmax(np.where(np.isfinite(series.value), series.value, -np.inf)))
    place = int(np.argmax(series.value == ratio))
    step = series.step[place]
    rate, bound = (run.series.get(f"{probe}/{one}") for one in ("rate", "rate_bound"))
    numbers = ""
    if rate is not None and bound is not None:
        numbers = f": {_at(rate, step):.3g} against {_at(bound, step):.3g}"
    if ratio > 1:
        text = (
            f"learning rate {ratio:.3g} times its bound at step {step}{numbers}"
            f" ({ratio_in_words(ratio)})"
        )
        bad = run_has_diverged(run) or _poor_accuracy(run) is not None
        yield "bad" if bad else "warn", "rate_above_bound", text, FURUSHO
    elif ratio < SLOW:
        text = (
            f"learning rate at most {ratio:.2g} of its bound, {ratio_in_words(ratio)}"
        )
        yield "warn", "rate_too_low", text, FURUSHO
    elif not _is_saturated(run, probe):
        text = f"learning rate below its bound throughout (at most {ratio:.3g} of it)"
        yield "good", "rate_below_bound", text, FURUSHO


def _at(series: Series, step: int) -> float:
    places = np.flatnonzero(series.step == step)
    return float(series.value[places[0]]) if len(places) else np.nan


def _curvature(run: Recorded) -> _Said:
    for probe in run.probes_with("lambda_max", "rate_bound"):
        if _is_saturated(run, probe):
            series = run.series[f"{probe}/lambda_max"]
            text = (
                f"Fisher lambda_max is {series.value[0]:.3g} at step"
                f" {series.step[0]}: the output is saturated, and bounds no rate"
            )
            yield "bad", "saturated", text, FURUSHO


def _is_saturated(run: Recorded, probe: str) -> bool:
    series = run.series.get(f"{probe}/lambda_max")
    return series is not None and bool(0 <= series.value[0] < SATURATED)


def _units(run: Recorded) -> _Said:
    for probe in run.probes_with("dead/<site>", "rate/<site>"):
        if dead := run.depth.get(f"{probe}/dead"):
            little = _poor_accuracy(run) is not None or bool(_flat_accuracy(run))
            rates = run.depth.get(f"{probe}/rate") or {}
            yield from _units_of(dead, rates, is_bad=little)


def _units_of(
    dead: Mapping[str, Series], rates: Mapping[str, Series], *, is_bad: bool
) -> _Said:
    source = "units on for no example of the probe batch"
    last = {site: float(one.value[-1]) for site, one in dead.items()}
    worst = max(last, key=lambda site: np.nan_to_num(last[site], nan=-1.0))
    if last[worst] >= DEAD_IN_TRAINING:
        above = sum(share >= DEAD_IN_TRAINING for share in last.values())
        text = (
            f"dead units: {above} of {len(last)} layers have half or more of theirs"
            f" dead at the end ({last[worst]:.0%} at {worst})"
        )
        yield "bad" if is_bad else "warn", "dead_units", text, source
        return
    found = np.array([one.value[-1] for one in rates.values()])
    if not found.size or not np.isfinite([*found, *last.values()]).all():
        return
    least, most = f"{found.min():.2f}", f"{found.max():.2f}"
    between = f"rate {least}" if least == most else f"rates {least} to {most}"
    layers = "1 layer" if len(last) == 1 else f"{len(last)} layers"
    share = f"at most {last[worst]:.1%} of a layer's units dead"
    text = f"{layers}, activation {between}, {share if last[worst] else 'nothing dead'}"
    yield "good", "units", f"{text} at the end", source


def _gap(run: Recorded) -> _Said:
    gap = run.series.get("generalization_gap")
    if gap is None or not gap.value[-1] > OVERFIT:
        return
    accuracy = stage_series(run, "val", "accuracy")
    at = "" if accuracy is None else f", validation accuracy {accuracy.value[-1]:.3g}"
    text = f"generalization gap {gap.value[-1]:.3g} at the end{at}"
    yield "warn", "generalization_gap", text, "validation loss less training loss"


def _without_probes(run: Recorded) -> _Said:
    logged = any(find_declared(run.quantities, key) for key in run.series)
    if not logged and not run.depth:
        text = "no probe measured it, so nothing is said of depth, units or curvature"
        yield "info", "nothing_measured", text, ""


def _stability(run: Recorded) -> _Said:
    for probe in run.probes_with("eps_hyp", "eps_hyp/stderr"):
        eps = run.series.get(f"{probe}/eps_hyp")
        if eps is None:
            continue
        error = run.series.get(f"{probe}/eps_hyp/stderr")
        spread = "" if error is None else f" ± {error.value[-1]:.2g}"
        text = f"one training example moves the loss by {eps.value[-1]:.3g}{spread}"
        yield "info", "stability", f"{text} (eps_hyp)", STABILITY


_JUDGES: tuple[Callable[[Recorded], _Said], ...] = (
    _ending,
    _learning,
    _pathology,
    _rate,
    _curvature,
    _units,
    _gap,
    _stability,
    _without_probes,
)

"""The verdicts on depth: from what was measured to findings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_resnorm.diagnose import advice
from lit_resnorm.diagnose.report import DepthRow, Finding
from lit_resnorm.diagnose.trends import (
    COLLAPSED,
    DEAD_AT_START,
    FAR,
    TELLING,
    Trend,
    kept_apart,
    main_line,
    trend,
)
from lit_resnorm.measures.moments.pathology import MIN_LAYERS, STEEP, Verdict

TOO_FAR = "a factor of 1/sqrt(eps) of float32"


@dataclass(frozen=True)
class DepthMeasurement:
    """What the verdicts on depth rest on.

    Attributes:
        rows: The table by depth.
        verdict: On signal and noise.
        num_examples: Size of the probe batch.
        normalised: Whether the network has norms.
        without_rule: Operations that noise can't pass.
    """

    rows: Sequence[DepthRow]
    verdict: Verdict
    num_examples: int
    normalised: bool
    without_rule: tuple[str, ...] = ()

    @property
    def residual(self) -> bool:
        """Whether the network has residual additions."""
        return any(row.kind == "addition" for row in self.rows)

    @property
    def forward(self) -> Trend:
        """Of the activations' norms, from input to output."""
        line = main_line(self.rows)
        return trend([r.depth for r in line], [r.forward for r in line])

    @property
    def backward(self) -> Trend:
        """Of the gradients' norms, from output to input."""
        line = main_line(self.rows)[::-1]
        return trend([-r.depth for r in line], [r.backward for r in line])

    @property
    def undetermined(self) -> bool:
        """Whether signal and noise can't be judged."""
        return self.verdict.pathology == "undetermined" or self.num_examples < 2


def depth_findings(measured: DepthMeasurement) -> list[Finding]:
    """Return what goes wrong with depth."""
    found = not_finite(measured.rows)
    if found:
        return found
    # the cause of what may follow
    found += _dead_layers(measured.rows)
    found += _signal_or_noise(measured)
    found += _norms(measured, "activations", measured.forward)
    found += _norms(measured, "gradients", measured.backward)
    return found + _headless(measured.rows)


def not_finite(rows: Sequence[DepthRow]) -> list[Finding]:
    """Return the finding on activations or gradients that aren't finite."""
    for direction in ("forward", "backward"):
        for row in rows:
            value = getattr(row, direction)
            if value is None or math.isfinite(value):
                continue
            what = "activations" if direction == "forward" else "gradients"
            words = f"{what} are not finite, first at {row.site}"
            evidence = {"site": row.site, "value": value}
            return [Finding("not_finite", "pathology", words, evidence)]
    return []


def _signal_or_noise(measured: DepthMeasurement) -> list[Finding]:
    if measured.undetermined:
        return [_no_verdict(measured)]
    verdict = measured.verdict.pathology
    most, end = kept_apart(measured.rows)
    collapsed = measured.verdict.num_layers >= TELLING and end <= COLLAPSED * most
    if verdict == "signal" or (collapsed and verdict != "snr"):
        return [_signal(measured)]
    return [_noise(measured)] if verdict == "snr" else []


def _evidence(measured: DepthMeasurement) -> dict[str, float]:
    """Return what the verdict on signal and noise rests on."""
    verdict = measured.verdict
    ranks = [
        row.effective_rank
        for row in measured.rows
        if row.effective_rank is not None and not math.isnan(row.effective_rank)
    ]
    chi = [row.log_sensitivity for row in main_line(measured.rows)]
    most, end = kept_apart(measured.rows)
    return {
        "layers": verdict.num_layers,
        "effective_rank_largest": max(ranks, default=math.nan),
        "effective_rank_at_end": verdict.effective_rank,
        "log_chi_slope": verdict.exponential.slope,
        "log_chi_at_end": chi[-1] if chi else math.nan,
        "exponential_goodness": verdict.exponential.goodness,
        "power_goodness": verdict.power.goodness,
        "separation_largest": most,
        "separation_at_end": end,
    }


def _signal(measured: DepthMeasurement) -> Finding:
    evidence = _evidence(measured)
    numbers = (
        f"the share of their power off it falls from"
        f" {evidence['separation_largest']:.2g} to"
        f" {evidence['separation_at_end']:.2g}, the effective rank from"
        f" {evidence['effective_rank_largest']:.3g} to"
        f" {evidence['effective_rank_at_end']:.3g}, over"
    )
    if math.isnan(evidence["separation_at_end"]):
        numbers = "at the end they are all equal, after"
    words = (
        f"signal pathology: the examples collapse to a line; {numbers}"
        f" {evidence['layers']} layers"
    )
    return Finding(
        "signal",
        "pathology",
        words,
        evidence,
        advice.against_collapse(residual=measured.residual),
        f"{advice.LABATIE}, section 4",
        "P",
    )


def _noise(measured: DepthMeasurement) -> Finding:
    evidence = _evidence(measured)
    words = (
        "noise pathology: the noise over the signal, chi, grows exponentially, by"
        f" {math.exp(evidence['log_chi_slope']):.3g} a layer (from"
        f" {math.exp(STEEP):.3g} on it is an explosion) to"
        f" {_power(evidence['log_chi_at_end'])}"
    )
    suggestions = (
        advice.against_explosion(residual=True, normalised=measured.normalised)
        if measured.residual
        else (advice.SKIPS_AND_NORM,)
    )
    return Finding(
        "noise",
        "pathology",
        words,
        evidence,
        suggestions,
        f"{advice.LABATIE}, section 4",
        "P",
    )


def _no_verdict(measured: DepthMeasurement) -> Finding:
    layers = measured.verdict.num_layers
    if measured.num_examples < 2:
        why = "one example has no variance: take more"
    elif layers < MIN_LAYERS:
        why = f"{layers} layers deep, and fewer than {MIN_LAYERS} show no trend"
    elif measured.without_rule:
        why = f"noise can't pass {', '.join(measured.without_rule)}"
    else:
        why = "chi follows neither an exponential nor a power of depth"
    words = f"no verdict on signal and noise: {why}"
    return Finding("undetermined", "note", words, {"layers": layers})


def _norms(measured: DepthMeasurement, what: str, found: Trend) -> list[Finding]:
    if not (found.explodes or found.vanishes):
        return []
    how = "exploding" if found.explodes else "vanishing"
    way = "from input to output" if what == "activations" else "from output to input"
    change = (
        "to 0" if math.isinf(found.change) else f"by a factor {_power(found.change)}"
    )
    if math.isinf(found.change) and found.change > 0:
        change = "from 0"
    words = f"{how} {what}: their root mean square changes {change} {way}"
    if math.isfinite(found.slope):
        words += f", {math.exp(found.slope):.3g} a layer"
    return [
        Finding(
            f"{how}_{what}",
            "pathology",
            words,
            {
                "log_change": found.change,
                "log_slope": found.slope,
                "goodness": found.goodness,
                "log_change_allowed": FAR,
            },
            advice.against_explosion(
                residual=measured.residual, normalised=measured.normalised
            ),
            f"more than {TOO_FAR}: what is left is lost in rounding",
            "D",
        )
    ]


def _dead_layers(rows: Sequence[DepthRow]) -> list[Finding]:
    dead = [row for row in rows if row.dead is not None and row.dead >= DEAD_AT_START]
    if not dead:
        return []
    names = ", ".join(row.site for row in dead[:3]) + (", ..." if dead[3:] else "")
    share = f"{DEAD_AT_START:.0%}"
    words = f"dead layers: {len(dead)} have {share} of their units or more off for"
    return [
        Finding(
            "dead_layers",
            "pathology",
            f"{words} every example ({names})",
            {"sites": [row.site for row in dead], "share": [row.dead for row in dead]},
            (advice.HALF_ON,),
            "half of the units are off at most where examples lie on a ray",
            "D",
        )
    ]


def _headless(rows: Sequence[DepthRow]) -> list[Finding]:
    norms = [row.backward for row in rows if row.backward is not None]
    if not norms or np.any(norms):
        return []
    words = (
        "no verdict on gradients: the loss's gradient is 0 at every site, as where the"
        " head starts at 0 or the output is saturated"
    )
    return [Finding("no_gradient", "note", words)]


def _power(log: float) -> str:
    """Return the exponential of a number in words, also where that overflows."""
    if not math.isfinite(log) or abs(log) < 6:
        return f"{math.exp(log):.3g}"
    power, part = divmod(log / math.log(10), 1)
    return f"{10**part:.1f}e{int(power):+03d}"

"""What a diagnosis holds, and its form as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_resnorm.runs.json_lines import plain_nest

Severity = Literal["pathology", "warning", "note"]
"""A pathology makes a network ill; a warning and a note are said."""

Status = Literal["healthy", "pathological", "undetermined"]

Mark = Literal["P", "D", "A", "R"]
"""Where a statement is from: published, derived here, an abstract, the literature."""


@dataclass(frozen=True)
class DepthRow:
    """One place of the network; None where a quantity has no meaning there.

    Attributes:
        site: The place's name, in the order of execution.
        kind: `activation`, `addition`, or another kind where there are none of these.
        depth: Layers up to and with this place: activations, or in transformers
            residual additions.
        activation_rate: Share of positive preactivations.
        dead: Share of units that are on for no example.
        effective_rank: Of the channels; 1 where the examples lie on a line.
        log_sensitivity: Natural log of chi, the noise over the signal.
        branch_share: Share of a residual branch in the variance of an addition.
        separation: Share of the examples' power that lies off the best line.
        forward: Root mean square of the output.
        backward: Root mean square of the gradient of an example's loss with respect to
            the output.
    """

    site: str
    kind: str
    depth: int
    activation_rate: float | None
    dead: float | None
    effective_rank: float | None
    log_sensitivity: float
    branch_share: float | None
    separation: float
    forward: float
    backward: float | None


@dataclass(frozen=True)
class Suggestion:
    """What to try.

    Attributes:
        words: The advice.
        source: Where it is from.
        mark: How it is known: P published, D derived, A abstract, R literature.
    """

    words: str
    source: str
    mark: Mark


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: `signal`, `noise`, `exploding_activations`, `vanishing_activations`,
            `exploding_gradients`, `vanishing_gradients`, `dead_layers`,
            `rate_too_high`, `not_finite`; the warnings `rate_above_bound`,
            `rate_too_low`, `loss_hardly_fell`, `saturated`; or what a note is about.
            `docs/values.md` explains each.
        severity: `pathology`, `warning` or `note`.
        words: The verdict in one or two sentences.
        evidence: The numbers behind it.
        suggestions: What the papers advise.
        source: What the verdict itself rests on.
        mark: How that is known.
    """

    name: str
    severity: Severity
    words: str
    evidence: dict[str, Any] = field(default_factory=dict)
    suggestions: tuple[Suggestion, ...] = ()
    source: str = ""
    mark: Mark = "D"


@dataclass(frozen=True)
class Trial:
    """Full-batch steps at one rate.

    Attributes:
        rate: The learning rate.
        in_bounds: The rate over the bound of the measured curvature; None where there
            is no bound.
        first: Loss before the first step.
        last: Mean loss over the last steps; of one that diverged, its largest.
        stable: Whether no loss went beyond 1000 times the first, or 1000, and the last
            is no more than the first.
        highest: Largest loss on the way; NaN where it isn't known.
    """

    rate: float
    in_bounds: float | None
    first: float
    last: float
    stable: bool
    highest: float = math.nan

    @property
    def jumps(self) -> bool:
        """Whether the loss went beyond ten times its first value."""
        return self.highest > 10 * self.first


@dataclass(frozen=True)
class StableRates:
    """Where training becomes unstable.

    Attributes:
        optimizer: What took the steps, in words.
        norm_mode: `train` where batch norm couples the examples of a step, else
            `frozen`: how the curvature behind `bound` was measured.
        bound: The rate bound of that curvature; None of an optimizer without one.
        num_steps: Steps of each trial.
        trials: By rate, ascending.
    """

    optimizer: str
    norm_mode: str
    bound: float | None
    num_steps: int
    trials: tuple[Trial, ...]

    @property
    def smallest_unstable(self) -> Trial | None:
        """The smallest rate that was unstable; None where all were stable."""
        return next((trial for trial in self.trials if not trial.stable), None)

    @property
    def largest_stable(self) -> Trial | None:
        """The largest rate below every unstable one; None where there is none."""
        stable: Trial | None = None
        for trial in self.trials:
            if not trial.stable:
                break
            stable = trial
        return stable


@dataclass(frozen=True)
class Curvature:
    """The Fisher matrix's spectrum, and the rate that it bounds.

    Attributes:
        lambda_max: Largest eigenvalue.
        lambda_mean: Mean over all eigenvalues.
        bound: Rate above which the optimizer diverges on a quadratic of this curvature;
            None where none applies.
        optimizer: What takes the steps, in words.
        rate: Largest configured rate; None where none is known.
        loss: The loss whose curvature it is, in words.
    """

    lambda_max: float
    lambda_mean: float
    bound: float | None
    optimizer: str
    rate: float | None
    loss: str = ""

    @property
    def ratio(self) -> float | None:
        """The configured rate over its bound; None where either is unknown."""
        if self.rate is None or self.bound is None:
            return None
        return self.rate / self.bound if self.bound else math.inf


@dataclass(frozen=True)
class Diagnosis:
    """A report on a network before training, or at a checkpoint.

    Attributes:
        network: Name of the module.
        status: `healthy`; `pathological`; or `undetermined`, neither of the two.
        findings: The gravest first.
        rows: The table by depth.
        curvature: None where there is none to measure.
        stable_rates: Where that was asked for.
        trends: Fits over depth that the verdicts rest on.
        settings: Size of the probe batch and the like.
        not_judged: What no verdict covers: `signal and noise`, `gradients`, `rate`.
    """

    network: str
    status: Status
    findings: tuple[Finding, ...]
    rows: tuple[DepthRow, ...]
    curvature: Curvature | None
    stable_rates: StableRates | None
    trends: dict[str, float]
    settings: dict[str, Any]
    not_judged: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no pathology was found of what was judged; see `not_judged`."""
        return self.status == "healthy"

    @property
    def pathologies(self) -> tuple[str, ...]:
        """Names of the pathologies that were found."""
        return tuple(f.name for f in self.findings if f.severity == "pathology")

    @property
    def verdict(self) -> str:
        """The verdict in a few words, with what it doesn't cover."""
        if self.status != "pathological":
            left_out = ", ".join(self.not_judged)
            return f"{self.status} ({left_out} not judged)" if left_out else self.status
        return ", ".join(name.replace("_", " ") for name in self.pathologies)

    def as_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists and numbers; those not finite as words."""
        values = {**asdict(self), "healthy": self.healthy, "verdict": self.verdict}
        if self.curvature is not None:
            values["curvature"]["ratio"] = self.curvature.ratio
        if self.stable_rates is not None:
            for name in ("largest_stable", "smallest_unstable"):
                trial = getattr(self.stable_rates, name)
                values["stable_rates"][name] = trial and asdict(trial)
        return plain_nest(values)

    def to_json(self) -> str:
        """Return it as JSON; NaN and infinities are words, as in a run directory."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

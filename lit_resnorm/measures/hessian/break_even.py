"""Where curvature stops growing along a training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Growth:
    """Whether a value that is followed through training still grows.

    Source: Jastrzebski et al. (2020), The break-even point on optimization
    trajectories of deep neural networks, arXiv 2002.09572 (seed): the step from which
    on the largest eigenvalue of the Hessian no longer grows.

    Attributes:
        tol: Relative error of the values.
        patience: How many values without a new record end the growth.
        step: Of the record; -1 before the first value.
        record: The largest value so far.
        last: Step of the last value.
        since: Values since the record.
        ended_at: The break-even point: the step of the record that the next `patience`
            values did not pass; None before.
    """

    tol: float
    patience: int = 1
    step: int = -1
    record: float = -math.inf
    last: int = -1
    since: int = 0
    ended_at: int | None = None

    def add(self, step: int, value: float) -> None:
        """Take in the value of a later step than all before; NaN is left out."""
        if step <= self.last or not math.isfinite(value):
            return
        self.last = step
        if self.ended_at is not None:
            return
        if self.step < 0 or value > self.record + self.tol * abs(self.record):
            self.step, self.record, self.since = step, value, 0
            return
        self.since += 1
        if self.since >= self.patience:
            self.ended_at = self.step

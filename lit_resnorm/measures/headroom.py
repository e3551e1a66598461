r"""How far the step that was taken could have gone before the loss rises.

With the update :math:`\Delta` of an optimizer's step and the loss
:math:`\phi(s) = L(\theta + s \Delta)` along it, the headroom is
:math:`\inf\{s > 0 : \phi(s) > \phi(0)\}`. On a quadratic with Hessian H, along
:math:`-\eta g`, it is :math:`2 g^\top g / (\eta\, g^\top H g)`: the rate over the one
in use at which this step would no longer lower the loss.

Source: Kalra et al., arXiv 2601.16979, critical learning rate and sharpness, for the
bracketing by doubling; we close the bracket by secants of
:math:`(\phi(s) - \phi(0)) / s`, a line where the loss is quadratic, in place of halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

LARGEST = 2.0**10
SMALLEST = 2.0**-10
"""Multiples of the step within which the loss is looked at."""

_BRACKET = 1 / 16
"""Relative width of a bracket that is close enough."""

_RAISED = 1.2
"""Factor of the loss that `alpha_star` is about."""


class Headroom(NamedTuple):
    """What the loss along a step says of its length.

    Attributes:
        step: The headroom, in lengths of the step: below 1 the step raised the loss.
            Infinite where nothing in range raises it, 0 where the step doesn't descend
            at all; NaN where the loss at its beginning is no number.
        alpha_star: The same for a loss of 1.2 times that at the beginning; NaN where
            that one isn't positive.
        num_losses: How often the loss was taken.
    """

    step: float
    alpha_star: float
    num_losses: int


def headroom(loss: Callable[[float], float], start: Headroom | None = None) -> Headroom:
    """Return how far a step could go before the loss along it rises.

    Brackets from 1 by factors of 2 within `SMALLEST` and `LARGEST`, then closes the
    bracket until its ends differ by less than a sixteenth. A loss that isn't finite is
    one that rose; a rise and fall between two points is not seen.

    Args:
        loss: Takes the distance in lengths of the step, returns the loss there.
        start: An earlier step's, near which the brackets begin: fewer losses, and the
            same brackets where the loss rises but once.
    """
    along = _Along(loss)
    first = along(0.0)
    if not math.isfinite(first):
        return Headroom(math.nan, math.nan, along.num_losses)
    near = start or Headroom(1.0, 1.0, 0)
    step = along.crossing(first, near.step)
    star = along.crossing(_RAISED * first, near.alpha_star) if first > 0 else math.nan
    return Headroom(step, star, along.num_losses)


class _Along:
    """The loss along a step, each distance taken once."""

    def __init__(self, loss: Callable[[float], float]) -> None:
        self._loss = loss
        self._known: dict[float, float] = {}

    def __call__(self, distance: float) -> float:
        if distance not in self._known:
            value = self._loss(distance)
            self._known[distance] = value if math.isfinite(value) else math.inf
        return self._known[distance]

    @property
    def num_losses(self) -> int:
        return len(self._known)

    def crossing(self, bound: float, near: float) -> float:
        """Return where the loss first exceeds a bound, as far as the bracket tells."""
        low, high = self._bracket(bound, near)
        if low == 0 or math.isinf(high):
            return 0.0 if low == 0 else math.inf
        missed = False
        while high - low >= _BRACKET * low:
            middle, beyond = self._guess(low, high, bound)
            if missed:
                middle, beyond = math.sqrt(low * high), None
            exceeds = self(middle) > bound
            low, high = (low, middle) if exceeds else (middle, high)
            # after a guess on the wrong side the bracket is halved once
            missed = beyond is not None and beyond != exceeds
        return self._meeting(low, high, bound)

    def _bracket(self, bound: float, near: float) -> tuple[float, float]:
        """Return a distance at which the loss is within the bound, and one beyond.

        The first is 0 where there is none in range, the second infinite.
        """
        near = 2.0 ** math.floor(math.log2(min(max(near, SMALLEST), LARGEST)))
        inside = [s for s, value in self._known.items() if s and value <= bound]
        high = min((s for s, v in self._known.items() if v > bound), default=math.inf)
        low = max((s for s in inside if s < high), default=0.0)
        if low < near < high:
            low, high = (near, high) if self(near) <= bound else (low, near)
        while math.isinf(high) and low < LARGEST:
            above = min(2 * low, LARGEST)
            low, high = (above, high) if self(above) <= bound else (low, above)
        while not low and high > SMALLEST:
            below = max(high / 2, SMALLEST)
            low, high = (below, high) if self(below) <= bound else (low, below)
        return low, high

    def _guess(
        self, low: float, high: float, bound: float
    ) -> tuple[float, bool | None]:
        """Return where to look next, and whether the loss should exceed the bound.

        Just beyond the expected crossing, and then just before it, closes the bracket
        around it; where it lies at an end, the middle does.
        """
        expected, apart = self._meeting(low, high, bound), 1 + _BRACKET / 6
        beyond, before = expected * (1 + _BRACKET / 3), expected / (1 + _BRACKET / 3)
        if beyond * apart < high:
            return beyond, True
        if before > low * apart:
            return before, False
        return math.sqrt(low * high), None

    def _meeting(self, low: float, high: float, bound: float) -> float:
        """Return where a parabola through three known losses meets the bound.

        Through those at 0 and at both ends; the middle where there is none.
        """
        first, ends = self(0.0), (self(low), self(high))
        middle = math.sqrt(low * high)
        if not all(map(math.isfinite, ends)):
            return middle
        slopes = (ends[0] - first) / low, (ends[1] - first) / high
        bend = (slopes[1] - slopes[0]) / (high - low)
        slope = slopes[0] - bend * low
        root = slope**2 + 4 * bend * (bound - first)
        if bend <= 0 or root < 0:
            return middle
        # one of the two forms cancels
        far = math.sqrt(root)
        found = (far - slope) / (2 * bend)
        if slope > 0:
            found = 2 * (bound - first) / (far + slope)
        return min(max(found, low), high)

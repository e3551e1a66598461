"""Trends of norms over depth, and what counts as an explosion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_resnorm.diagnose.report import DepthRow
from lit_resnorm.measures.moments.pathology import GOOD, MIN_LAYERS, line_fit

FAR = -0.5 * math.log(2.0**-23)
"""Change of the log of a norm over depth that is an explosion, or a vanishing: 8.0.

Norms then differ by 1/sqrt(eps) of float32, a factor of 2896, and their squares by
1/eps: what the weakest layer adds to the power of a residual stream, or to the loss
that a gradient step gains, is below the rounding of what the strongest adds.
"""

COLLAPSED = 0.5
"""Share of its largest separation to which that of collapsed examples has fallen.

Separation goes with the square of the angle between examples, which falls as 3 pi / l
over l layers without normalisation, to a twentieth, and hardly with it. Narrow
convolutional nets scatter about that, by a factor of ten between initialisations.
"""

TELLING = 2 * MIN_LAYERS
"""Layers from which a fallen separation is a pathology.

A plain net of ten layers, which trains, has lost as much; by Labatie's stored values
its effective rank is 2.8 there and 1.7 at twenty layers.
"""

DEAD_AT_START = 0.9
"""Share of dead units from which a layer is dead.

Where all examples lie on one ray half of the units of a layer are off for all of them.
Of 64 independent units 0.9 are with probability 1e-11: so this is another matter.
"""


@dataclass(frozen=True)
class Trend:
    """The straight line through the log of a norm against depth.

    Attributes:
        slope: Change a layer.
        change: Change over the depth of the points, along the line; infinite where the
            norm is 0 at one end and not at the other.
        goodness: Share of the variance that the line explains.
    """

    slope: float
    change: float
    goodness: float

    @property
    def explodes(self) -> bool:
        """Whether the norm grows too far to be of use."""
        return self.change >= FAR and self._straight

    @property
    def vanishes(self) -> bool:
        """Whether it shrinks as far."""
        return self.change <= -FAR and self._straight

    @property
    def _straight(self) -> bool:
        return math.isinf(self.change) or self.goodness >= GOOD


NO_TREND = Trend(math.nan, math.nan, math.nan)


def trend(depths: Sequence[int], norms: Sequence[float | None]) -> Trend:
    """Return the trend of the log of norms over depth.

    A norm of 0 has no log: where those at one end of the depth are 0 and others aren't,
    the change is infinite. Fewer than three places, or a norm that isn't finite: none.
    """
    points = [(d, n) for d, n in zip(depths, norms, strict=True) if n is not None]
    if len(points) < 3 or not all(math.isfinite(n) for _, n in points):
        return NO_TREND
    positive = [(d, n) for d, n in points if n > 0]
    if not positive:
        return NO_TREND
    if not points[0][1] and points[-1][1]:
        return Trend(math.nan, math.inf, math.nan)
    if points[0][1] and not points[-1][1]:
        return Trend(math.nan, -math.inf, math.nan)
    depth = np.array([d for d, _ in positive], dtype=float)
    fit = line_fit(depth, np.log([n for _, n in positive]))
    return Trend(fit.slope, fit.slope * float(depth[-1] - depth[0]), fit.goodness)


def main_line(rows: Sequence[DepthRow]) -> list[DepthRow]:
    """Return the rows where trends are taken.

    Residual additions where there are at least a quarter as many of them as
    activations, else activations, as for the verdict on signal and noise; where there
    are neither, all.
    """
    additions = [row for row in rows if row.kind == "addition"]
    activations = [row for row in rows if row.kind == "activation"]
    if 4 * len(additions) >= max(1, len(activations)):
        return additions
    return activations or list(rows)


def kept_apart(rows: Sequence[DepthRow]) -> tuple[float, float]:
    """Return the largest separation of the examples, and that at the end.

    The end is the median over the deepest tenth. NaN where there is none.
    """
    values = np.array([row.separation for row in main_line(rows)])
    if not len(values) or np.isnan(values).all():
        return math.nan, math.nan
    end = np.median(values[-max(1, len(values) // 10) :])
    return float(np.nanmax(values)), float(end)

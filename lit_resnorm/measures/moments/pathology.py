"""The verdict on a profile: what, if anything, goes wrong with depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_resnorm.measures.moments.profile import DepthProfile, SiteMoments
from lit_resnorm.quantities import PATHOLOGIES

Pathology = Literal["none", "signal", "snr", "undetermined"]

MIN_LAYERS = 8
"""Fewer layers than this tell no trend."""

LINE = 1.5
"""At or below this effective rank the examples lie on a line, whatever chi does."""

NEAR_LINE = 2.1
"""At or below this one they do unless noise explodes: batch norm ends near 2 too."""

STEEP = 0.12
"""Growth of log chi a layer that is an explosion: noise doubles in six layers."""

DROWNED = 5.4
"""Log of chi at which the rounding of 8-bit images is as strong as their signal.

Rounding has a standard deviation of 1 / (255 sqrt 12), images one of about 1 / 4.
"""

GOOD = 0.8
"""Share of the variance of log chi that a growth law must explain."""


@dataclass(frozen=True)
class Fit:
    """A straight line by least squares, through log chi for one.

    Attributes:
        slope: Its slope.
        goodness: Share of the variance that it explains, in [0, 1].
    """

    slope: float
    goodness: float


@dataclass(frozen=True)
class Verdict:
    """What goes wrong with depth, and the trends that say so.

    Attributes:
        pathology: `signal`: the examples collapse to a line. `snr`: noise grows
            exponentially over the signal. `none`: neither. `undetermined`: too few
            layers, values that are not finite, or no law that fits.
        num_layers: Layers on the way to the last point of the trend, see
            `layer_depths`.
        effective_rank: Median over the deepest tenth of the layers.
        exponential: Fit of log chi against depth, in layers.
        power: Fit of log chi against log depth.
    """

    pathology: Pathology
    num_layers: int
    effective_rank: float
    exponential: Fit
    power: Fit

    @property
    def code(self) -> int:
        """The verdict as a number, as it is logged."""
        return next(c.number for c in PATHOLOGIES if c.word == self.pathology)


def pathology(profile: DepthProfile) -> Verdict:
    """Return the verdict on a network from the trends of its profile over depth.

    Log chi at the sites of `spine` is fitted against depth, in layers, and against log
    depth, over the deepest nine tenths. In this order, the verdict is

    - `undetermined` with fewer than 8 layers, or where chi is NaN;
    - `signal` where chi is infinite at the end (all examples equal), or where the
      effective rank has fallen to 1.5 or less and, less one, to half its largest;
    - `snr` where the exponential fits better than the power law, with a goodness of
      0.8 at least, and log chi grows by 0.12 a layer or more, in a residual net up to
      5.4 at least (the rounding of 8-bit images is then as strong as their signal);
    - `signal` where the effective rank has fallen so to 2.1 or less;
    - `undetermined` where log chi grows so and no law fits to 0.8;
    - `none`.

    One effective rank doesn't tell: convolutional nets end at 1.8 to 2 without batch
    norm (zero padding) and at 2.03 with it; chi, flat in one and exponential in the
    other, does. Batch norm without skips grows by 0.15 to 0.21 a layer. Residual nets
    in stages of growing width, whose power law begins anew at each stage, grow by 0.08
    to 0.13 (ResNet-18 and 50 at initialisation, chi at the end 8 to 11 and 160 to 260):
    logged, and no pathology.

    Source: Labatie (2019), arXiv 1811.03087, section 4, where the pathologies are
    defined as limits of depth; the thresholds are ours.
    """
    layers = spine(profile)
    log_chi = np.array([float(profile[name].log_sensitivity) for name in layers])
    depth = np.array([*layers.values()], dtype=float)
    deep = depth > max(depth, default=0) / 10
    exponential = line_fit(depth[deep], log_chi[deep])
    power = line_fit(np.log(depth[deep]), log_chi[deep])
    num_layers = int(max(depth, default=0))
    residual = any(profile[name].kind == "addition" for name in layers)
    counted = _counted_kind([site.kind for site in profile.sites])
    end, fallen = _rank_trend(profile.of_kind(counted))
    return Verdict(
        pathology=_judge(
            num_layers, log_chi, exponential, power, end, fallen, residual=residual
        ),
        num_layers=num_layers,
        effective_rank=end,
        exponential=exponential,
        power=power,
    )


def spine(profile: DepthProfile) -> dict[str, int]:
    """Return the sites where trends are taken, and how many layers deep each is.

    Residual additions where there are at least a quarter as many of them as
    activations, else activations.
    """
    activations, additions = profile.of_kind("activation"), profile.of_kind("addition")
    residual = 4 * len(additions) >= max(1, len(activations))
    kind = "addition" if residual else "activation"
    depths = layer_depths([site.kind for site in profile.sites])
    return {
        site.name: depth
        for site, depth in zip(profile.sites, depths, strict=True)
        if site.kind == kind
    }


def layer_depths(kinds: Sequence[str]) -> list[int]:
    """Return how many layers deep each site is, at least 1.

    Layers are activations; where there are more residual additions than activations, as
    in transformers, whose blocks have two of these, they are additions.

    Args:
        kinds: Of the sites, in the order of execution.
    """
    counted = _counted_kind(kinds)
    depth, depths = 0, []
    for kind in kinds:
        depth += kind == counted
        depths.append(max(depth, 1))
    return depths


def _counted_kind(kinds: Sequence[str]) -> str:
    return max(("activation", "addition"), key=kinds.count)


def _judge(
    num_layers: int,
    log_chi: np.ndarray,
    exponential: Fit,
    power: Fit,
    end: float,
    fallen: bool,
    *,
    residual: bool,
) -> Pathology:
    if num_layers < MIN_LAYERS or np.isnan(log_chi).any():
        return "undetermined"
    if log_chi[-1] == math.inf or (fallen and end <= LINE):
        return "signal"
    grows = exponential.slope >= STEEP
    good = max(exponential.goodness, power.goodness) >= GOOD
    sustained = not residual or log_chi[-1] >= DROWNED
    if grows and good and sustained and exponential.goodness > power.goodness:
        return "snr"
    if fallen and end <= NEAR_LINE:
        return "signal"
    return "undetermined" if grows and not good else "none"


def line_fit(x: np.ndarray, y: np.ndarray) -> Fit:
    """Return the least-squares line; NaN with fewer than three places or a NaN."""
    if len(set(x)) < 3 or not np.isfinite(y).all():
        return Fit(math.nan, math.nan)
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    total = float(y @ y)
    return Fit(slope, slope**2 * float(x @ x) / total if total else 1.0)


def _rank_trend(sites: Sequence[SiteMoments]) -> tuple[float, bool]:
    """Return the effective rank at the end, and whether it has fallen to it."""
    ranks = np.array(
        [float(s.effective_rank) for s in sites if s.effective_rank is not None]
    )
    if not len(ranks) or np.isnan(ranks).all():
        return math.nan, False
    end = float(np.median(ranks[-max(1, len(ranks) // 10) :]))
    excess = float(np.nanmax(ranks)) - 1
    # Two examples always lie on a line: a rank that is 1 all along says nothing.
    return end, excess > 0.1 and end - 1 <= excess / 2

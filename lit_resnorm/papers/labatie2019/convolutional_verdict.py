"""Verdicts on convolutional nets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pandas as pd

from lit_resnorm.papers.item import Check, Settings, between, near, ordered
from lit_resnorm.papers.labatie2019.fig4 import CONVOLUTIONAL_SLOPE, slope
from lit_resnorm.papers.labatie2019.fig5 import inner_step, log_slope, share_check
from lit_resnorm.papers.labatie2019.propagation import stored_value
from lit_resnorm.papers.summaries import curve, means, where
from lit_resnorm.theory import activation_step, power_exponent

__all__ = ["check_collapse", "check_dilution", "check_explosion"]

# Mean and deviation of one draw over 200 draws of the author's nets on MNIST.
RANKS = {2: (4.24, 0.18), 10: (12.5, 1.3), 50: (4.29, 1.5), 200: (2.03, 0.06)}
STEPS = {"delta_bn": 1.14, "delta_phi": 1.02}
FOURTH = 127.0
STEP = 1.2
CHI_500 = 33.0


def check_collapse(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 3: rank and growth of the sensitivity tend to 1."""
    depth, half = settings["depth"], settings["depth"] // 2
    logs = curves.pivot(index="draw", columns="layer", values="log_chi")
    rates = (logs[depth] - logs[half]).to_numpy() / (depth - half)
    error = _error(rates)
    # In collapsed nets log nu_2 drifts by -5/2D a layer, and the noise's log power
    # not upwards, as its mean is kept.
    drift = 5 / (4 * settings["width"])
    ranks = means(curves, "layer", "rank", median=True)
    falling = {f"l={layer}": ranks[layer] for layer in (depth, half, 20)}
    return [
        between(
            f"delta chi, l={half} to {depth} (1 to 1 + 5/4D, 4 standard errors)",
            float(np.exp(rates.mean())),
            float(np.exp(-4 * error)),
            float(np.exp(drift + 4 * error)),
            "D",
        ),
        ordered("median r_eff after ReLU", falling, "P"),
        between(f"median r_eff after ReLU at l={depth}", ranks[depth], 1.0, 2.0, "D"),
    ]


def check_explosion(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 4: log chi is linear in depth, the signal fat-tailed."""
    depth = settings["depth"]
    draws = [part for _, part in curves.groupby("draw")]
    slopes = [slope(part) for part in draws]
    deep = [part[part.layer > 20] for part in draws]
    fits = [_goodness(part.layer, part.log_chi) for part in deep]
    ranks = means(curves, "layer", "rank")
    fourths = means(curves, "layer", "mu4")
    falling = {f"l={layer}": ranks[layer] for layer in (depth, 50, 10)}
    rising = {f"l={layer}": fourths[layer] for layer in (10, 50, depth)}
    late = curves[curves.layer >= 0.75 * depth]
    steps = {name: float(np.mean(late[name])) for name in reversed(STEPS)}
    nu1 = float(np.mean(late.nu1))
    found = [
        between(
            "log chi linear in depth beyond l=20: R^2, smallest",
            float(min(fits)),
            0.99,
            None,
            "P",
        ),
        ordered("mean r_eff after ReLU", falling, "P"),
        ordered("mean mu_4(z)", rising, "P"),
        ordered(f"mean growths from layer {0.75 * depth:.0f} on", steps, "P"),
        near(
            "mean delta_phi: theory from nu_1 (0.01 and 3 standard errors)",
            steps["delta_phi"],
            activation_step(nu1),
            0.01 + 3 * _error(late.delta_phi),
            "D",
        ),
    ]
    return [*found, *_stored_checks(curves, settings, slopes, steps)]


def _stored_checks(
    curves: pd.DataFrame,
    settings: Settings,
    slopes: list[float],
    steps: Mapping[str, float],
) -> list[Check]:
    if not settings["stored"]:
        return []
    name = "slope of log chi a layer (4 standard errors)"
    found = [stored_value(name, slopes, *CONVOLUTIONAL_SLOPE)]
    for layer, stored in RANKS.items():
        name = f"r_eff after ReLU at l={layer} (4 standard errors)"
        ranks = where(curves, layer=layer)["rank"]
        found.append(stored_value(name, ranks, *stored))
    for name, expected in STEPS.items():
        label = f"late mean of {name} (0.01 and the last digit)"
        found.append(near(label, steps[name], expected, 0.015, "P"))
    last = where(curves, layer=settings["depth"]).mu4
    name = f"mu_4(z) at l={settings['depth']} (10%)"
    return [*found, near(name, float(np.mean(last)), FOURTH, 0.1, "P", relative=True)]


def check_dilution(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 5: chi is a power of depth."""
    depth = settings["depth"]
    draws = [part for _, part in curves.groupby("draw")]
    slopes = np.array([log_slope(part, depth) for part in draws])
    step = inner_step(curves, beyond=depth / 2)
    logs = curve(cast(pd.DataFrame, curves[curves.unit > 5]), "unit", "log_chi")
    fits = {
        "exponential": _goodness(logs.x, logs.mean),
        "power": _goodness(np.log(logs.x), logs.mean),
    }
    ranks = means(curves, "unit", "rank")
    first, last = min(ranks), max(ranks)
    found = [
        near(
            "log-log slope of chi in the second half against tau = (d^4 - 1)/2 of the "
            "d measured there (0.03 and 4 standard errors)",
            float(slopes.mean()),
            power_exponent(step),
            0.03 + 4 * _error(slopes),
            "D",
        ),
        ordered("R^2 of log chi as a line in l and in log l", fits, "P"),
        near("growth d through an inner layer", inner_step(curves), STEP, 0.05, "P"),
        share_check(curves, settings),
        between(
            f"r_eff after ReLU at unit {last} over that at unit {first}",
            ranks[last] / ranks[first],
            1.0,
            None,
            "P",
        ),
    ]
    if settings["stored"]:
        chi = np.exp(where(curves, unit=500).log_chi)
        name = "chi after 500 units (read off; 15%)"
        value = float(np.mean(chi))
        found.append(near(name, value, CHI_500, 0.15, "P", relative=True))
    return found


def _goodness(x: Any, y: Any) -> float:
    """Return the share of y's variance that a line in x explains."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _error(values: Any) -> float:
    """Return the standard error of a mean; 0 for a single value."""
    num = len(values)
    return float(np.std(values, ddof=1) / num**0.5) if num > 1 else 0.0

"""Signal and noise in random nets, after Labatie (2019)."""

import math
from typing import NamedTuple

__all__ = [
    "GAUSSIAN_NU1",
    "LogPower",
    "activation_step",
    "collapsed_log_power",
    "power_exponent",
    "residual_share",
    "residual_step",
]

GAUSSIAN_NU1 = math.sqrt(2 / math.pi)
"""Mean absolute value of a standard Gaussian."""


class LogPower(NamedTuple):
    """Mean and variance over initialisations of the logarithm of a power."""

    mean: float
    variance: float


def collapsed_log_power(depth: int, width: int) -> LogPower:
    r"""Return mean and variance of `log nu_2` of a collapsed fully connected net.

    .. math:: E \log \nu_2 = -\frac{5 l}{2 D}, \quad
              \mathrm{Var} \log \nu_2 = \frac{5 l}{D}, \quad E\,\nu_2 = 1

    for a ReLU net with He's variances whose examples have collapsed to a line; the
    last is exact.

    Source: derived [D]; it reproduces the stored histograms of Labatie (2019),
    arXiv 1811.03087 (D = 128, l = 200: -3.82 and 7.77 against -3.91 and 7.81).

    Args:
        depth: Number of layers l.
        width: D.
    """
    variance = 5 * depth / width
    return LogPower(-variance / 2, variance)


def activation_step(nu1: float = GAUSSIAN_NU1) -> float:
    r"""Return the sensitivity's growth through a ReLU after batch norm.

    .. math:: \delta_\phi = (1 - \nu_1(|z|)^2 / 2)^{-1/2}

    Source: Labatie (2019), arXiv 1811.03087, section 5 [P]. 1.211 for Gaussian z.

    Args:
        nu1: Mean absolute value of the normalised pre-activation, in [0, 1].

    Raises:
        ValueError: If it lies outside.
    """
    if not 0 <= nu1 <= 1:
        raise ValueError(f"nu1 must lie in [0, 1]; got {nu1}")
    return (1 - nu1**2 / 2) ** -0.5


def power_exponent(step: float, num_layers: int = 2) -> float:
    r"""Return the exponent of the sensitivity's power law in batch-normed ResNets.

    .. math:: \chi^l \sim l^\tau, \quad \tau = (d^{2H} - 1) / 2

    Source: Labatie (2019), arXiv 1811.03087, public code [P]; derived here from
    `residual_step` [D].

    Args:
        step: Growth d of the sensitivity through one inner layer.
        num_layers: Layers H in a branch.
    """
    return (step ** (2 * num_layers) - 1) / 2


def residual_step(step: float, index: int, num_layers: int = 2) -> float:
    r"""Return the growth of the sensitivity through the l-th residual unit.

    .. math:: (\chi^{l}/\chi^{l-1})^2 = 1 + s_l (d^{2H} - 1)

    Signal and noise of skip and branch add; the branch holds the share `s_l` of the
    signal's power, and its noise-to-signal ratio is `d^{2H}` times that of its input.

    Source: Labatie (2019), arXiv 1811.03087, Theorem 4 [P]; this form derived [D].

    Args:
        step: Growth d through one inner layer.
        index: The unit's number l, from 1.
        num_layers: Layers H in a branch.
    """
    share = residual_share("res_bn", index)
    return math.sqrt(1 + share * (step ** (2 * num_layers) - 1))


def residual_share(variant: str, index: int) -> float:
    r"""Return the branch's share of the power after the l-th residual unit.

    `1 / (l + 1)` with batch norm in the branch, 1/2 without.

    Source: De & Smith (2020), arXiv 2002.10444 [P for batch norm]; derived [D].

    Args:
        variant: `res_bn` or `res`.
        index: The unit's number l, from 1.

    Raises:
        ValueError: On another variant, or an index below 1.
    """
    if index < 1:
        raise ValueError(f"index counts units from 1; got {index}")
    if variant not in ("res_bn", "res"):
        raise ValueError(f"variant must be res_bn or res; got {variant!r}")
    return 1 / (index + 1) if variant == "res_bn" else 0.5

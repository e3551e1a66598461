"""Polyak-Lojasiewicz constants of deep linear nets, and the ratio of any net.

The loss is `L = |M X - Y|^2 / (2 N)`, M the product of square layer maps: `W_j` (mlp),
`I + W_j` (res1) or `I + W_{j,2} W_{j,1}` (res2). There is no stem and no read-out.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "LinearVariant",
    "contraction",
    "layer_maps",
    "least_squares_loss",
    "log_pl_bound",
    "log_pl_constant",
    "pl_ratio",
]

LinearVariant = Literal["mlp", "res1", "res2"]


def layer_maps(variant: str, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices `A_j` that the net multiplies, in order of execution.

    Args:
        variant: `mlp`, `res1` or `res2`.
        weights: Square weight matrices in order of execution; for res2 `W_{j,1}` and
            `W_{j,2}` of each block in turn.

    Returns:
        float64 matrices `(D, D)`, one for each block.

    Raises:
        ValueError: On another variant, or an odd number of weights for res2.
    """
    matrices = [weight.detach().double() for weight in weights]
    kind = _checked_variant(variant)
    if kind == "mlp":
        return matrices
    eye = torch.eye(len(matrices[0]), dtype=torch.float64, device=matrices[0].device)
    if kind == "res1":
        return [eye + weight for weight in matrices]
    if len(matrices) % 2:
        raise ValueError(f"res2 has two weights a block; got {len(matrices)}")
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    return [eye + second @ first for first, second in pairs]


def log_pl_constant(
    variant: str, weights: Sequence[Tensor], covariance_DD: Tensor
) -> Tensor:
    r"""Return the logarithm of the PL constant of a deep linear net at its weights.

    .. math:: \mu = \lambda_{\min}(\Sigma) \sum_j w_j
              \prod_{i \ne j} \sigma_{\min}(A_i)^2

    with `w_j = 1`, for res2 `sigma_min(W_{j,1})^2 + sigma_min(W_{j,2})^2`; then
    `|grad L|^2 / 2 >= mu (L - L*)`. `lambda_min` is the smallest non-zero eigenvalue:
    the gradient of the product lies in the range of Sigma.

    Source: derived [D]; the content of Table 1 of Furusho & Ikeda (2020), whose
    literal form isn't known.

    Args:
        variant: `mlp`, `res1` or `res2`.
        weights: As for `layer_maps`.
        covariance_DD: Second moments of the inputs, `X X^T / N`.

    Returns:
        0-d float64 tensor, natural logarithm; `-inf` where two maps are singular.
    """
    kind = _checked_variant(variant)
    maps = layer_maps(kind, weights)
    log_sigma_J = torch.stack([_log_smallest(a) for a in maps])
    if kind == "res2":
        squares = [2 * _log_smallest(w.detach().double()) for w in weights]
        log_w_J = torch.stack(squares).view(-1, 2).logsumexp(1)
    else:
        log_w_J = torch.zeros_like(log_sigma_J)
    values_D = torch.linalg.eigvalsh(covariance_DD.double())
    floor = values_D[-1] * len(values_D) * torch.finfo(torch.float64).eps
    smallest = values_D[values_D > floor].min()
    # the product over all but j, without the 0 / 0 of a singular map
    eye_JJ = torch.eye(len(maps), dtype=torch.bool, device=log_sigma_J.device)
    others_J = log_sigma_J.expand(len(maps), -1).masked_fill(eye_JJ, 0.0).sum(1)
    return smallest.log() + (log_w_J + 2 * others_J).logsumexp(0)


def log_pl_bound(
    variant: str, num_weights: int, tau: float, tau_min: float | None = None
) -> float:
    r"""Return the logarithm of a bound on mu / lambda_min from the weights' norms.

    .. math:: L \tau^{2L-2}, \quad L (1-\tau)^{2L-2}, \quad
              L \tau'^2 (1-\tau^2)^{L-2}

    Source: derived [D].

    Args:
        variant: `mlp`: every singular value is at least `tau`; `res1`: every norm is at
            most `tau < 1`; `res2`: likewise, and singular values at least `tau_min`.
        num_weights: Number L of weight matrices; res2 has L / 2 blocks.
        tau: See `variant`.
        tau_min: The bound tau' on the singular values of res2's weights.

    Returns:
        Natural logarithm.

    Raises:
        ValueError: Where the bound says nothing: `tau >= 1` for residual nets, or no
            positive lower bound.
    """
    kind = _checked_variant(variant)
    lower = tau_min if kind == "res2" else tau
    if lower is None or lower <= 0:
        raise ValueError(f"{kind} needs a positive lower bound; got {lower}")
    log_num = math.log(num_weights)
    if kind == "mlp":
        return log_num + (2 * num_weights - 2) * math.log(tau)
    if tau >= 1:
        raise ValueError(f"tau must be below 1 for {kind}; got {tau}")
    if kind == "res1":
        return log_num + (2 * num_weights - 2) * math.log1p(-tau)
    return log_num + 2 * math.log(lower) + (num_weights - 2) * math.log1p(-(tau**2))


def pl_ratio(squared_gradient: float, loss: float, infimum: float) -> float:
    r"""Return `rho = |grad L|^2 / (2 (L - L*))`; mu is a lower bound of it.

    Source: the definition of the Polyak-Lojasiewicz condition, read along a path [D].

    Args:
        squared_gradient: Squared norm of the whole gradient.
        loss: L.
        infimum: L*.

    Returns:
        Infinite where the loss is at its infimum.
    """
    excess = loss - infimum
    return squared_gradient / (2 * excess) if excess > 0 else math.inf


def contraction(log_mu: float, smoothness: float) -> float:
    """Return the factor `1 - mu / beta` by which a gradient step cuts the excess loss.

    Source: Polyak (1963); Charles & Papailiopoulos (2018), arXiv 1710.08402; for the
    step 1 / beta. The literal content of Table 2 isn't known [A].

    Args:
        log_mu: Natural logarithm of the PL constant.
        smoothness: Largest curvature beta along the path.

    Raises:
        ValueError: If `smoothness` isn't positive.
    """
    if smoothness <= 0:
        raise ValueError(f"smoothness must be positive; got {smoothness}")
    return -math.expm1(log_mu - math.log(smoothness))


def least_squares_loss(x_DN: Tensor, y_DN: Tensor) -> Tensor:
    """Return `L* = min_M |M X - Y|^2 / (2 N)`, the infimum for square linear nets.

    Args:
        x_DN: Inputs, one a column.
        y_DN: Targets, one a column.

    Returns:
        0-d float64 tensor.
    """
    x_ND, y_ND = x_DN.double().T, y_DN.double().T
    fitted_ND = x_ND @ torch.linalg.lstsq(x_ND, y_ND, driver="gelsd").solution
    return (fitted_ND - y_ND).square().sum() / (2 * len(x_ND))


def _checked_variant(variant: str) -> LinearVariant:
    for known in get_args(LinearVariant):
        if variant == known:
            return known
    choices = ", ".join(get_args(LinearVariant))
    raise ValueError(f"variant must be one of {choices}; got {variant!r}")


def _log_smallest(matrix_DD: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix_DD)[-1].log()

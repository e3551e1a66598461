"""Algorithmic stability: how much one training example changes the trained network.

Dimensions: K removals, Z test examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stability:
    r"""Differences between a network A(S) and its twins A(S^i), each without z_i.

    Attributes:
        eps_hyp: Hypothesis stability, the mean of |l(A(S); z) - l(A(S^i); z)| over
            removals i and test examples z.
        eps_point: Pointwise hypothesis stability, the mean of
            |l(A(S); z_i) - l(A(S^i); z_i)| over removals.
        eps_unif: The maximum of the differences that `eps_hyp` averages.
        eps_hyp_stderr: Standard error of `eps_hyp`, clustered over removals.
        eps_point_stderr: Standard error of `eps_point`.
        eps_unif_stderr: Jackknife standard error of `eps_unif` over removals: an
            indication, for a maximum has no consistent jackknife.
        replace_signed: Mean of l(A(S^i); z_i) - l(A(S); z_i) over removals. With z_i
            replaced by a fresh draw its expectation is the generalization gap.
        replace_signed_stderr: Its standard error.
        finite: Which twins gave finite losses, shape `(K,)`; the others are censored.
        twin_eps_hyp: Mean difference over test examples, by removal, shape `(K,)`.
        twin_signed: l(A(S^i); z_i) - l(A(S); z_i) by removal, shape `(K,)`.

    Source: Furusho & Ikeda (2020), doi 10.1017/ATSIP.2020.7, figures 1 and 5, after
    Bousquet & Elisseeff (2002). How many removals they used isn't known.
    """

    eps_hyp: Tensor
    eps_point: Tensor
    eps_unif: Tensor
    eps_hyp_stderr: Tensor
    eps_point_stderr: Tensor
    eps_unif_stderr: Tensor
    replace_signed: Tensor
    replace_signed_stderr: Tensor
    finite: Tensor
    twin_eps_hyp: Tensor
    twin_signed: Tensor


def stability(
    losses_Z: Tensor, twin_losses_KZ: Tensor, own_K: Tensor, twin_own_K: Tensor
) -> Stability:
    """Return how far the losses of twins are from those of the network.

    Args:
        losses_Z: The network's losses of test examples, l(A(S); z).
        twin_losses_KZ: The twins' losses of them, l(A(S^i); z).
        own_K: The network's losses of the removed examples, l(A(S); z_i).
        twin_own_K: Each twin's loss of the example that it lacks, l(A(S^i); z_i).

    Returns:
        Float64 tensors in the unit of the losses. Twins with a loss that isn't finite
        are left out of every mean and maximum; NaN where none is left.

    Raises:
        ValueError: If the shapes don't match.
    """
    num = len(own_K)
    if twin_losses_KZ.shape != (num, len(losses_Z)) or len(twin_own_K) != num:
        raise ValueError(
            f"losses of {len(losses_Z)} test and {num} removed examples need twins'"
            f" losses of shape ({num}, {len(losses_Z)}) and ({num},); they have"
            f" {tuple(twin_losses_KZ.shape)} and {tuple(twin_own_K.shape)}"
        )
    apart_KZ = (twin_losses_KZ.double() - losses_Z.double()).abs()
    signed_K = twin_own_K.double() - own_K.double()
    finite_K = twin_losses_KZ.isfinite().all(1) & twin_own_K.isfinite()
    mean_K, largest_K = apart_KZ.mean(1), apart_KZ.amax(1)
    kept_K, kept_signed_K = mean_K[finite_K], signed_K[finite_K]
    return Stability(
        eps_hyp=kept_K.mean(),
        eps_point=kept_signed_K.abs().mean(),
        eps_unif=_max(largest_K[finite_K]),
        eps_hyp_stderr=_stderr(kept_K),
        eps_point_stderr=_stderr(kept_signed_K.abs()),
        eps_unif_stderr=_stderr_of_max(largest_K[finite_K]),
        replace_signed=kept_signed_K.mean(),
        replace_signed_stderr=_stderr(kept_signed_K),
        finite=finite_K,
        twin_eps_hyp=mean_K,
        twin_signed=signed_K,
    )


def _max(values_K: Tensor) -> Tensor:
    return values_K.max() if len(values_K) else values_K.new_tensor(torch.nan)


def _stderr(values_K: Tensor) -> Tensor:
    """Return the standard error of the mean of independent values; NaN for one."""
    if len(values_K) < 2:
        return values_K.new_tensor(torch.nan)
    return values_K.std() / len(values_K) ** 0.5


def _stderr_of_max(values_K: Tensor) -> Tensor:
    """Return the jackknife standard error of the maximum; NaN for one value.

    Leaving out any value but the largest leaves the maximum as it is.
    """
    num = len(values_K)
    if num < 2:
        return values_K.new_tensor(torch.nan)
    largest, second = values_K.topk(2).values
    return (largest - second) * (num - 1) / num

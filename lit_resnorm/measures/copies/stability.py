"""Algorithmic stability: how much one training example changes the trained network.

Dimensions: K removals, Z test examples of all ranks, M sets of weights, S further
examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.copies.attributes import Attributes, with_state
from lit_resnorm.measures.copies.copies import Losses, ModelFunction
from lit_resnorm.measures.passes.batches import occupied
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched


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


@torch.no_grad()
def losses_at(
    model: nn.Module,
    losses: Losses,
    weights: Sequence[Mapping[str, Tensor]],
    states: Sequence[Attributes],
    batch: Any,
    examples: Any = None,
    *,
    norm_mode: str = "frozen",
    reduce: Reduce = identity,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the losses of examples at several sets of weights.

    Batch norm with `frozen` statistics takes them from the batch, at each set of
    weights anew, for the further examples too.

    Args:
        model: The model, which is left as it was.
        losses: Gives the loss of each example.
        weights: Weights and buffers by name; what a set lacks is the model's own.
        states: Plain attributes to begin with, at each set of weights.
        batch: This rank's share: every world-size-th example, from the rank-th on.
        examples: Further examples, the same on every rank; None: none.
        norm_mode: `frozen` or `eval`.
        reduce: Sums over ranks.
        rank: This rank.

    Returns:
        Float64 tensors of shapes `(M, Z)` and `(M, S)`.
    """
    batch, empty = occupied(batch)
    shares, further = [], []
    with untouched(model, norm_mode=norm_mode, reduce=reduce) as run, torch.no_grad():
        for own, state in zip(weights, states, strict=True):
            bound = ModelFunction(model, with_state(losses, state, state))
            share_B = run(
                lambda own=own, bound=bound: bound.with_weights(own, batch),
                empty=empty,
                recalibrate=True,
            )
            shares.append(share_B[: 0 if empty else None].double())
            if examples is not None:
                further_S = run(
                    lambda own=own, bound=bound: bound.with_weights(own, examples)
                )
                further.append(further_S.double())
    share_MB = torch.stack(shares)
    gathered_MZ = _gathered(share_MB, reduce, rank)
    return gathered_MZ, torch.stack(further) if further else share_MB[:, :0]


def _gathered(share_MB: Tensor, reduce: Reduce, rank: int) -> Tensor:
    """Return all ranks' columns; this one's are every world-size-th, from `rank` on."""
    if reduce is identity:
        return share_MB
    counts = reduce(share_MB.new_tensor([1, share_MB.shape[1]]))
    world, total = (int(count) for count in counts)
    whole_MZ = share_MB.new_zeros(len(share_MB), total)
    whole_MZ[:, rank::world] = share_MB
    return reduce(whole_MZ)

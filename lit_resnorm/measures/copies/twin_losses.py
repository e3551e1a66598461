"""Losses of a model and of its twins on the same examples.

Dimensions: M sets of weights, Z examples of all ranks, S further examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.copies.attributes import Attributes, with_state
from lit_resnorm.measures.copies.copies import Bound, Losses
from lit_resnorm.measures.passes.untouched import Reduce, identity, occupied, untouched


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
            bound = Bound(model, with_state(losses, state, state))
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

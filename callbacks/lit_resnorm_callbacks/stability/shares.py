"""What each twin trains on of a batch: which rows, and how much each counts.

Dimensions: K twins, B rows of this rank's batch, R rows that a twin takes.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from lit_resnorm.measures.copies.twins import Share
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm_callbacks.stability.left_out import Hits


def shares(
    members: list[int],
    hits: Hits,
    reduction: Reduction,
    reduce: Reduce,
    *,
    world_size: int,
    scale: float,
    keep: bool = False,
    replaced: bool = False,
) -> list[Share]:
    """Return what twins take of a batch, the others' gradients being added over ranks.

    An example counts as in the run, whose loss is averaged over ranks: as its weight
    over the sum of its rank's weights and over the number of ranks. A twin lacks some,
    and what is left counts more by so much that it adds up to 1 again; on one rank that
    is the weighted mean of the others. A sum just lacks them. A twin for which nothing
    counts in any rank's batch is left out.

    Args:
        members: The twins.
        hits: Where the batch holds their examples.
        reduction: Makes the batch's loss of its examples'; where they are replaced, of
            these rows and then one in the place of each twin's example.
        reduce: Sums over ranks.
        world_size: Number of ranks.
        scale: Factor of the loss.
        keep: Keep the examples in the batch, with no weight.
        replaced: Put the further rows in the examples' places.
    """
    weights, num = reduction.weights.cpu(), hits.rows
    groups: dict[int | None, list[tuple[int, Tensor, list[int]]]] = defaultdict(list)
    taken: dict[int, tuple[Tensor, list[int], bool]] = {}
    for k in members:
        mine = {*hits.local[k]}
        rows = [r for r in range(num) if r not in mine]
        if replaced:
            rows = [num + k if r in mine else r for r in range(num)]
        counted = weights[:num] if not mine else weights[rows]
        whole = counted if replaced or not mine else weights[:num]
        if keep and mine and not replaced:
            counted = weights[:num].clone()
            counted[[*mine]] = 0.0
        if not reduction.summed and world_size > 1:
            counted = counted / (world_size * whole.sum())
        elif reduction.summed:
            counted = counted / world_size
        taken[k] = counted, rows, bool(mine)
    left_K = torch.stack([counted.sum() for counted, _, _ in taken.values()])
    if any(hits.total):
        left_K = reduce(left_K)
    elif world_size > 1:
        left_K = torch.ones_like(left_K)
    for (k, (counted, rows, lacks)), left in zip(taken.items(), left_K, strict=True):
        if not left:
            continue
        size = len(rows) if lacks and (replaced or not keep) else None
        factor = scale if reduction.summed else scale / left
        groups[size].append((k, factor * counted, rows))
    return [
        Share(
            [k for k, _, _ in group],
            torch.stack([weights_R for _, weights_R, _ in group]),
            None if size is None else torch.tensor([rows for _, _, rows in group]),
        )
        for size, group in groups.items()
    ]

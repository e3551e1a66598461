r"""The Gram (dual) matrix :math:`\tilde J \tilde J^\top`, block by block.

It has the non-zero eigenvalues of the Fisher matrix. What a backward pass leaves of a
block is kept until all rows and seeds are there (:class:`Store`); then its share is
added. Only products that the symmetry does not give are formed, and ranks share them.

Shapes: N rows, K seeds, D = N K, P parameters, I inputs, O outputs, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.blocks import Leavings, ParameterBlock, left_products
from lit_resnorm.measures.fisher.parameter_uses import outer_rows
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.fisher.stores import Store
from lit_resnorm.measures.fisher.sweep import Sweep, slices

EachBlock = Callable[[ParameterBlock, Tensor], None]

_TILE = 192  # rows of a tile of the Gram matrix: fits the cache, feeds the product


def gram_matrix(
    sweep: Sweep, memory: int, each_block: EachBlock | None = None
) -> Tensor:
    """Return the Gram matrix of all ranks' rows, shape `(D, D)`, on every rank.

    Args:
        sweep: Backward passes over this rank's rows.
        memory: Bytes that may be kept between passes. Where all blocks together need
            more, the passes are repeated for one group of blocks after another.
        each_block: Called with each block and its own Gram matrix, where wanted.
    """
    shards, dim = sweep.examples.shards, sweep.examples.dim
    gram_DD = torch.zeros(
        dim, dim, dtype=sweep.network.dtype, device=sweep.network.device
    )
    for group in _groups(sweep, memory):
        stores = {block: Store(block, sweep) for block in group}
        sweep(group, lambda block, left, stores=stores: stores[block].keep(left))
        for block in group:
            if each_block is None:
                _add_share(gram_DD, stores.pop(block), shards, memory)
                continue
            own_DD = torch.zeros_like(gram_DD)
            _add_share(own_DD, stores.pop(block), shards, memory)
            gram_DD += own_DD
            each_block(block, _whole(own_DD, shards))
    return _whole(gram_DD, shards)


def _groups(sweep: Sweep, memory: int) -> Iterator[list[ParameterBlock]]:
    # From the last block on: passes to late blocks alone are short.
    group: list[ParameterBlock] = []
    taken = 0
    for block in reversed(sweep.blocks):
        size = Store(block, sweep).num_bytes
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(block)
        taken += size
    if group:
        yield group


def _whole(gram_DD: Tensor, shards: Shards) -> Tensor:
    """Return the sum over ranks, its lower triangle filled from the upper one."""
    whole = gram_DD if shards.alone else shards.reduce(gram_DD)
    tiles = slices(len(whole), _TILE)
    for i, a in enumerate(tiles):
        whole[a, a] = whole[a, a].triu() + whole[a, a].triu(1).T
        for b in tiles[i + 1 :]:
            whole[b, a] = whole[a, b].T
    return whole


def _add_share(gram_DD: Tensor, store: Store, shards: Shards, memory: int) -> None:
    """Add a block's share to the tiles of the upper triangle that this rank forms."""
    kept = store.kept(shards)
    if kept.left is None:
        _add_rows(gram_DD, kept.rows.flatten(0, 1), shards)
    elif store.way == "late":
        # The gradients of some outputs at a time.
        one = len(gram_DD) * store.num_inputs * gram_DD.element_size()
        for right_NKOT in kept.rows.split(max(1, memory // (8 * one)), dim=2):
            rows_NKP = outer_rows(kept.left, right_NKOT, store.num_inputs)
            _add_rows(gram_DD, rows_NKP.flatten(0, 1), shards)
    elif kept.rows.shape[-1] == 1 and kept.left.is_floating_point():
        _add_outer(gram_DD, kept.left.squeeze(-1), kept.rows.squeeze(-1), shards)
    else:
        _add_inner(gram_DD, kept.left, kept.rows, shards)


def _pairs(num: int, size: int, shards: Shards) -> Iterator[tuple[slice, slice]]:
    """Return this rank's share of the pairs of tiles in the upper triangle."""
    tiles = slices(num, size)
    pairs = [(a, b) for i, a in enumerate(tiles) for b in tiles[i:]]
    yield from pairs[shards.rank :: len(shards.counts)]


def _add_rows(gram_DD: Tensor, rows_DP: Tensor, shards: Shards) -> None:
    for a, b in _pairs(len(gram_DD), _TILE, shards):
        gram_DD[a, b].addmm_(rows_DP[a], rows_DP[b].T)


def _add_outer(
    gram_DD: Tensor, left_NI: Tensor, right_NKO: Tensor, shards: Shards
) -> None:
    """Add `(left left^T) * (right right^T)`: one position, so no sum over positions."""
    num_rows, num_seeds, _ = right_NKO.shape
    for a, b in _pairs(num_rows, max(1, _TILE // num_seeds), shards):
        inner_NM = left_NI[a] @ left_NI[b].T
        share = right_NKO[a].flatten(0, 1) @ right_NKO[b].flatten(0, 1).T
        by_row = share.view(len(inner_NM), num_seeds, -1, num_seeds)
        by_row.mul_(inner_NM[:, None, :, None])
        gram_DD[_rows_of_examples(a, num_seeds), _rows_of_examples(b, num_seeds)] += (
            share
        )


def _add_inner(
    gram_DD: Tensor, left_NIT: Tensor, right_NKOT: Tensor, shards: Shards
) -> None:
    """Add the sums over positions t, t' of `left_t . left_t' right_t . right_t'`."""
    num_rows, num_seeds, _, _ = right_NKOT.shape
    for row in range(shards.rank, num_rows, len(shards.counts)):
        others_MST = right_NKOT[row:].flatten(1, 2)
        inner_MTT = left_products(left_NIT[row:], left_NIT[row]).to(others_MST)
        mixed_DX = torch.bmm(others_MST, inner_MTT).view(
            (num_rows - row) * num_seeds, -1
        )
        at = row * num_seeds
        gram_DD[at : at + num_seeds, at:] += right_NKOT[row].flatten(1) @ mixed_DX.T


def _rows_of_examples(rows: slice, num: int) -> slice:
    return slice(rows.start * num, rows.stop * num)


def parameter_matrix(sweep: Sweep) -> tuple[Tensor, dict[ParameterBlock, Tensor]]:
    """Return the Fisher matrix itself, for few parameters, and each block's places.

    Parameters that no pass uses are left out: their rows are zero.
    """
    places: dict[ParameterBlock, Tensor] = {}
    size = 0
    for block in sweep.blocks:
        places[block] = torch.arange(size, size + block.num_parameters)
        size += block.num_parameters
    matrix_PP = torch.zeros(
        size, size, dtype=sweep.network.dtype, device=sweep.network.device
    )
    parts: list[Tensor] = []

    def add(block: ParameterBlock, left: Leavings) -> None:
        parts.append(block.rows(left).flatten(0, 1))
        if len(parts) == len(places):
            rows_DP = torch.cat(parts, dim=1).to(matrix_PP)
            matrix_PP.addmm_(rows_DP.T, rows_DP)
            parts.clear()

    sweep(sweep.blocks, add)
    shards = sweep.examples.shards
    return matrix_PP if shards.alone else shards.reduce(matrix_PP), places

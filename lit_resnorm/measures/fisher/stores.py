"""What is kept of a block over all rows and seeds, until its Gram matrix is formed.

Shapes: N rows, K seeds, D = N K, P parameters, I inputs, O outputs, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.blocks import Leavings, ParameterBlock, outer_uses
from lit_resnorm.measures.fisher.parameter_uses import OuterUse
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.fisher.sweep import Sweep

GramWay = Literal["direct", "late", "inner"]
"""How a block's Gram matrix is formed: from its gradients; from gradients that are
formed at the end, of kept inputs and output gradients, because these are smaller; from
inner products of inputs and of output gradients, without any gradient of weights."""


@dataclass(frozen=True)
class Kept:
    """What a block's store holds, of all ranks.

    Attributes:
        rows: Gradients `(N, K, P)`, or output gradients `(N, K, O, T)`.
        left: With the latter, inputs `(N, I, T)`; an embedding's indices `(N, T)`.
    """

    rows: Tensor
    left: Tensor | None


def block_product(kept: Kept, dual_DB: Tensor) -> Tensor:
    """Return the product of a block's Gram matrix with dual vectors, float64.

    Args:
        kept: The block's store; with gradients `(N, K, P)`, or with inputs that are no
            indices.
        dual_DB: Shape `(D, B)`.
    """
    vectors = dual_DB.to(kept.rows)
    if kept.left is None:
        rows_DP = kept.rows.flatten(0, 1)
        return (rows_DP @ (rows_DP.T @ vectors)).double()
    n, k = kept.rows.shape[:2]
    mixed = torch.einsum("nkot,nkb->bnot", kept.rows, vectors.view(n, k, -1))
    weights_BOI = torch.einsum("bnot,nit->boi", mixed, kept.left)
    forth = torch.einsum("boi,nit->bnot", weights_BOI, kept.left)
    return torch.einsum("nkot,bnot->nkb", kept.rows, forth).reshape(n * k, -1).double()


class Store:
    """Keeps one block's gradients, or its inputs and output gradients.

    Args:
        block: Which.
        sweep: The passes that will fill it.

    Attributes:
        way: How the Gram matrix will be formed: what takes the fewest multiplications.
        num_inputs: I, where the block's uses are outer products.
        num_bytes: What the store will take on the rank with most rows.
    """

    def __init__(self, block: ParameterBlock, sweep: Sweep) -> None:
        examples = sweep.examples
        traced = outer_uses(block.uses(sweep.traced))
        most_rows = max(examples.shards.counts)
        self.block = block
        self.way: GramWay = "direct"
        self.num_inputs = 0
        numbers = examples.num_seeds * block.num_parameters
        shape: tuple[int, ...] = (block.num_parameters,)
        self._left_shape: tuple[int, ...] = ()
        if traced:
            sizes = Sizes.of_uses(traced)
            self.num_inputs = sizes.inputs
            kept = examples.num_seeds * sizes.outputs * sizes.positions + sum(
                use.input.numel() for use in traced
            )
            self.way = sizes.way(examples.shards.total, examples.num_seeds)
            if self.way == "late" and kept > 0.6 * numbers:
                self.way = "direct"
            if self.way != "direct":
                numbers, shape = kept, (sizes.outputs, sizes.positions)
                self._left_shape = sizes.left_shape
        dtype = sweep.network.dtype
        self.num_bytes = most_rows * numbers * dtype.itemsize
        self._left_dtype = traced[0].input.dtype if traced else dtype
        self._size = (examples.num_rows, examples.num_seeds, *shape)
        self._rows: Tensor | None = None
        self._passes: list[Leavings] = []
        self._like = torch.empty(0, dtype=dtype, device=sweep.network.device)

    def keep(self, left: Leavings) -> None:
        """Keep what a backward pass left at the block."""
        if self.way == "direct":
            new = self.block.rows(left)
        else:
            new = left.right()
            if left.seeds.start == 0:  # inputs are the same for all seeds
                self._passes.append(replace(left, grads=()))
        self._all()[left.rows, left.seeds] = new

    def kept(self, shards: Shards) -> Kept:
        """Return what was kept by all ranks."""
        rows = shards.gather(self._all())
        if self.way == "direct":
            return Kept(rows, None)
        none = self._like.new_empty(0, *self._left_shape, dtype=self._left_dtype)
        inputs = torch.cat([none, *(left.inputs() for left in self._passes)])
        left = shards.gather(inputs)
        return Kept(rows, left.to(rows) if left.is_floating_point() else left)

    def _all(self) -> Tensor:
        if self._rows is None:
            self._rows = self._like.new_empty(self._size)
        return self._rows


@dataclass(frozen=True)
class Sizes:
    """Sizes of a block of outer products, for one row.

    Attributes:
        inputs: I.
        outputs: O.
        positions: T, over all uses.
        indexed: Whether the inputs are one-hot, given by indices.
    """

    inputs: int
    outputs: int
    positions: int
    indexed: bool

    @classmethod
    def of_uses(cls, uses: Sequence[OuterUse]) -> Sizes:
        """Return the sizes of a block's uses in a pass on one row."""
        outputs = uses[0].num_outputs
        positions = sum(use.shape.numel() for use in uses) // outputs
        indexed = not uses[0].input.is_floating_point()
        return cls(uses[0].num_inputs, outputs, positions, indexed)

    @property
    def left_shape(self) -> tuple[int, ...]:
        """Shape of one row's inputs."""
        return (self.positions,) if self.indexed else (self.inputs, self.positions)

    def by_gradients(self, num_rows: int, num_seeds: int) -> float:
        """Return the multiplications of gradients and their inner products."""
        dim, size = num_rows * num_seeds, self.outputs * self.inputs
        form = (
            dim * self.outputs * self.positions * (1 if self.indexed else self.inputs)
        )
        return form + dim**2 * size / 2

    def by_positions(self, num_rows: int, num_seeds: int) -> float:
        """Return the multiplications of inner products over positions."""
        n, k, o, t = num_rows, num_seeds, self.outputs, self.positions
        i = 1 if self.indexed else self.inputs
        if t == 1 and not self.indexed:
            return n**2 * i / 2 + (n * k) ** 2 * (o + 4) / 2
        # Small products in batches run at half the speed of large ones.
        return n**2 * (t * t * i + k * o * t * t + k * k * o * t)

    def work(self, num_rows: int, num_seeds: int) -> float:
        """Return the multiplications of the cheaper way."""
        sizes = num_rows, num_seeds
        return min(self.by_gradients(*sizes), self.by_positions(*sizes))

    def way(self, num_rows: int, num_seeds: int) -> GramWay:
        """Return the way with the fewest multiplications."""
        sizes = num_rows, num_seeds
        inner = self.by_positions(*sizes) < self.by_gradients(*sizes)
        return "inner" if inner else "late"

"""The probe batch as the head sees it.

Shapes: N rows of this rank, T positions of a row that are examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_resnorm.measures.fisher.head import Head, Layout
from lit_resnorm.measures.fisher.shards import Shards


@dataclass
class Examples:
    """The probe batch as the head sees it.

    Attributes:
        x: This rank's rows, as the network takes them.
        num_rows: N of this rank.
        layout: How the output lies.
        slots: `(N, T)`: positions of each row that count as examples.
        scales: `(N, T)`: root of each one's share in the mean.
        targets: Labels, for the empirical Fisher.
        num_coefficients: Dual coefficients of a position.
        num_examples: Examples of all ranks: positions with a weight.
        shards: Rows of all ranks.
    """

    x: Any
    num_rows: int
    layout: Layout
    slots: Tensor
    scales: Tensor
    targets: Tensor | None
    num_coefficients: int
    num_examples: int
    shards: Shards

    @property
    def num_seeds(self) -> int:
        """Dual coefficients K of a row."""
        return self.slots.shape[1] * self.num_coefficients

    @property
    def dim(self) -> int:
        """Dimension of the dual space, over all ranks."""
        return self.shards.total * self.num_seeds

    def head(self, output: Tensor, rows: slice) -> Head:
        """Return the head at the output of some rows."""
        targets = None if self.targets is None else self.targets[rows]
        return Head(self.layout, output, self.slots[rows], self.scales[rows], targets)

"""Where this rank's share of the probe batch lies among all ranks' shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from lit_resnorm.measures.passes.untouched import Reduce, identity


@dataclass(frozen=True)
class Shards:
    """The probe batch as ranks hold it: their rows one after another.

    `reduce` only sums, so rows are gathered by placing each rank's rows at its offset
    in zeros and summing.

    Attributes:
        counts: Rows of each rank.
        rank: Place of this rank in `counts`.
        reduce: Sums a tensor over the ranks.
    """

    counts: tuple[int, ...]
    rank: int
    reduce: Reduce

    @classmethod
    def of_batch(cls, num_rows: int, reduce: Reduce, device: torch.device) -> Shards:
        """Return the shards of a batch of which this rank holds `num_rows` rows.

        With `reduce` other than `identity`, rank and number of ranks are those of
        torch's default process group, or 0 of 1 where there is none.
        """
        if reduce is identity or not dist.is_initialized():
            return cls((num_rows,), 0, identity)
        counts = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
        counts[dist.get_rank()] = num_rows
        summed = reduce(counts)
        return cls(tuple(int(c) for c in summed.tolist()), dist.get_rank(), reduce)

    @property
    def total(self) -> int:
        """Rows of all ranks together."""
        return sum(self.counts)

    @property
    def rows(self) -> slice:
        """This rank's rows among all."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    @property
    def alone(self) -> bool:
        """Whether one rank holds all."""
        return len(self.counts) == 1

    def gather(self, local: Tensor) -> Tensor:
        """Return the rows of all ranks, shape `(total, ...)`."""
        if self.alone:
            return local
        whole = local.new_zeros(self.total, *local.shape[1:])
        whole[self.rows] = local
        return self.reduce(whole)

    def largest(self, value: int, device: torch.device) -> int:
        """Return the maximum of a number over ranks."""
        if self.alone:
            return value
        values = torch.zeros(len(self.counts), dtype=torch.float64, device=device)
        values[self.rank] = value
        return int(self.reduce(values).max())

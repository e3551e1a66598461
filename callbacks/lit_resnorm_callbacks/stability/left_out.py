"""The examples that are left out, and the batches that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.batches import (
    joined,
    leaves,
    mapped,
    num_rows,
    take_rows,
)
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm_callbacks.probe.batch import fixed_batch


@dataclass(frozen=True)
class Hits:
    """Where a batch holds examples that are left out.

    Attributes:
        local: Rows of this rank's batch that hold each example.
        total: How often the batches of all ranks hold each.
        rows: Number of rows of this rank's batch.
        all_rows: Number of rows over all ranks.
        new: The examples that no earlier batch held.
    """

    local: list[list[int]]
    total: list[int]
    rows: int
    all_rows: int
    new: list[int]


class LeftOut:
    """K examples of the training set, kept when a batch first holds them.

    Args:
        removed: Their indices.

    Attributes:
        first_steps: Optimizer steps before each was first seen; None: not yet.
    """

    def __init__(self, removed: list[int]) -> None:
        self.removed = removed
        self.first_steps: list[int | None] = [None] * len(removed)
        self._places = {index: k for k, index in enumerate(removed)}
        self._rows: list[Any] = [None] * len(removed)

    @property
    def seen(self) -> list[int]:
        """Places, in `removed`, of the examples that were seen."""
        return [k for k, step in enumerate(self.first_steps) if step is not None]

    def examples(self) -> Any:
        """Return a batch of the examples that were seen, in the order of `seen`."""
        return joined([self._rows[k] for k in self.seen])

    def find(
        self,
        trainer: Trainer,
        batch: Any,
        indices: list[int],
        step: int,
        reduce: Reduce,
    ) -> Hits:
        """Return where the batch in hand holds them, and keep those that are new.

        Args:
            trainer: Knows the ranks.
            batch: This rank's batch.
            indices: Its examples' indices.
            step: Optimizer steps taken so far.
            reduce: Sums over ranks.

        Raises:
            ValueError: If the batch hasn't as many rows as there are indices.
        """
        num = num_rows(batch)
        if num != len(indices):
            raise ValueError(
                f"a batch has {num} rows, and its sampler named {len(indices)} examples"
            )
        local: list[list[int]] = [[] for _ in self.removed]
        for row, index in enumerate(indices):
            if index in self._places:
                local[self._places[index]].append(row)
        rank, world = trainer.global_rank, trainer.world_size
        counts_WK = torch.zeros(world, len(local) + 1, device=_device(batch))
        counts_WK[rank] = counts_WK.new_tensor([num, *map(len, local)])
        counts = reduce(counts_WK).tolist()
        totals = [int(sum(column)) for column in zip(*counts, strict=True)]
        total = totals[1:]
        new = [k for k in range(len(local)) if total[k] and self._rows[k] is None]
        for k in new:
            owner = next(r for r in range(world) if counts[r][k + 1])
            mine = local[k] if owner == rank else None
            self._rows[k] = _shared_row(batch, mine, reduce)
            self.first_steps[k] = step
        return Hits(local, total, num, totals[0], new)

    def state_dict(self) -> dict[str, Any]:
        """Return which examples are left out, since when, and those seen."""
        return {
            "removed": self.removed,
            "first_steps": [*self.first_steps],
            "rows": [*self._rows],
        }

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it is of other examples.
        """
        if state_dict["removed"] != self.removed:
            raise ValueError(
                f"the checkpoint's twins lack the examples {state_dict['removed']}, not"
                f" {self.removed}: resume with the num_twins, removed and seed that it"
                " was made with"
            )
        self.first_steps = state_dict["first_steps"]
        self._rows = pytree.tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, state_dict["rows"]
        )


def choose_removed(
    num: int, removed: list[int] | None, seed: int, size: int, name: str
) -> list[int]:
    """Return the indices of the examples to leave out of a training set.

    Args:
        num: How many.
        removed: The indices, where they are given.
        seed: Seed of the draw, where they aren't.
        size: Size of the training set.
        name: The probe's name, for messages.

    Raises:
        ValueError: If the set has too few examples, or lacks one of the indices.
    """
    if removed is None:
        if num > size:
            raise ValueError(
                f"{name}: num_twins is {num}, and the training set holds {size}"
                " examples"
            )
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(size, generator=generator)[:num].tolist()
    if wrong := [index for index in removed if not 0 <= index < size]:
        raise ValueError(
            f"{name}: removed names {wrong}, and the training set holds the examples 0"
            f" to {size - 1}"
        )
    return removed


def drawn_instead(
    trainer: Trainer,
    module: LightningModule,
    num: int,
    *,
    seed: int,
    probed: int,
    name: str,
    dataloader: Any = None,
    batch_dim: int = 0,
) -> Any:
    """Return a batch of validation examples to put in the place of those left out.

    They are drawn from those that follow the probe batch, where there are enough.

    Args:
        trainer: A running trainer.
        module: Its module.
        num: How many.
        seed: Seed of the draw.
        probed: Size of the probe batch, if it comes from the same loader.
        name: The probe's name, for messages.
        dataloader: A loader to read from; None: the validation loader.
        batch_dim: Dimension that counts examples in its batches.

    Raises:
        ValueError: If there are too few.
    """
    pool = fixed_batch(
        trainer,
        module,
        probed + num,
        name=name,
        dataloader=dataloader,
        batch_dim=batch_dim,
    )
    size = num_rows(pool)
    if size < num:
        raise ValueError(
            f"{name}: replace needs {num} validation examples, and there are {size}"
        )
    first = min(probed, size - num)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size - first, generator=generator)[:num]
    return take_rows(pool, first + order)


def _shared_row(batch: Any, rows: list[int] | None, reduce: Reduce) -> Any:
    """Return the first of these rows, of the rank that gives them, on every rank."""
    device = _device(batch)
    row = take_rows(batch, torch.tensor(rows[:1] if rows else [0], device=device))

    def share(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        given = leaf if rows else torch.zeros_like(leaf)
        return reduce(given).clone()

    return mapped(share, row)


def _device(batch: Any) -> torch.device:
    return next(x.device for x in leaves(batch) if isinstance(x, Tensor))

"""Forms of a measurement of a Fisher matrix, and what they cost before they are paid.

Work is counted in multiplications at a processor's full rate, from shapes alone: the
same on every machine, on every rank and after a resume. A training step is one of the
same model on the whole batch: forward, backward, optimizer, and the loop around them.

Shapes: D dual coefficients of all rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lit_resnorm.measures.fisher.blocks import outer_uses
from lit_resnorm.measures.fisher.costs import num_products
from lit_resnorm.measures.fisher.measurement import Measurement, measurement
from lit_resnorm.measures.fisher.options import FisherOptions
from lit_resnorm.measures.fisher.stores import Sizes

_LOOP = 4e7
"""Work of a step that no shape tells: the trainer's loop, about a millisecond."""

_CALL = 1e6
"""Work that a pass through a block takes, however small."""

_TEN = 10
"""Eigenvalues that are measured where all cost too much."""


@dataclass(frozen=True)
class FisherForm:
    """What of a Fisher matrix is measured.

    Attributes:
        num_eigenvalues: The largest k; None all, 0 none; `auto` all of a matrix that is
            small enough, else the largest 10.
        layer_eigenvalues: The largest k of each layer's block; 0 none.
        num_rows: Rows of the batch that are measured, over all ranks.
        cost: Training steps that it takes, by counted work; NaN where uncounted.
    """

    num_eigenvalues: int | str | None
    layer_eigenvalues: int
    num_rows: int
    cost: float = math.nan

    def followed(self) -> FisherForm:
        """Return traces and the largest eigenvalue, of what is measured else."""
        count = 0 if self.num_eigenvalues == 0 else 1
        return replace(self, num_eigenvalues=count, layer_eigenvalues=0, cost=math.nan)

    def cheaper(self) -> Iterator[FisherForm]:
        """Yield this form, and those that leave out ever more."""
        yield self
        count = self.num_eigenvalues
        if count is None:
            yield replace(self, num_eigenvalues=_TEN)
        ten = _TEN if count is None else min(int(count), _TEN)
        yield replace(self, num_eigenvalues=ten, layer_eigenvalues=0)
        least = replace(self, num_eigenvalues=min(ten, 1), layer_eigenvalues=0)
        yield least
        # batch norm in mode train has no statistics of a single row
        while least.num_rows > 2:
            least = replace(least, num_rows=least.num_rows // 2)
            yield least

    def __str__(self) -> str:
        count = self.num_eigenvalues
        if not count and count is not None:
            words = "traces"
        elif count is None:
            words = "all eigenvalues"
        else:
            words = "lambda_max" if count == 1 else f"the {count} largest eigenvalues"
        layers = " and those of layers" if self.layer_eigenvalues else ""
        return f"{words}{layers} on {self.num_rows} examples"


def affordable_form(
    model: nn.Module,
    few: Any,
    wanted: FisherForm,
    max_cost: float,
    options: FisherOptions,
) -> tuple[FisherForm, FisherForm]:
    """Return what is wanted with its cost, and the fullest form within `max_cost`.

    Where none is, the cheapest: lambda_max and traces on two rows.

    Args:
        model: Any module; it is untouched.
        few: Some rows of the batch, which show the shapes.
        wanted: What is to be measured, of how many rows.
        max_cost: Training steps on as many rows.
        options: How it will be measured; on one rank.

    Raises:
        ValueError: As the measurement does.
    """
    with measurement(model, few, options) as measured:
        count = _Count.of(measured)
    if wanted.num_eigenvalues == "auto":
        size = min(wanted.num_rows * count.seeds, count.num_parameters)
        wanted = replace(
            wanted, num_eigenvalues=replace(options, num_eigenvalues="auto").count(size)
        )
    step = count.step(wanted.num_rows)
    forms = [replace(form, cost=count.work(form) / step) for form in wanted.cheaper()]
    chosen = next((form for form in forms if form.cost <= max_cost), forms[-1])
    return forms[0], chosen


@dataclass(frozen=True)
class _Count:
    """Multiplications by their kind, from the shapes of one row.

    Attributes:
        sizes: Of each block of outer products.
        others: Parameters of each other block.
        seeds: Dual coefficients K of a row.
        num_parameters: P.
        coupled: Whether rows are measured together.
        one_by_one: Whether gradients of some block are taken a row at a time.
    """

    sizes: tuple[Sizes, ...]
    others: tuple[int, ...]
    seeds: int
    num_parameters: int
    coupled: bool
    one_by_one: bool

    @classmethod
    def of(cls, measured: Measurement) -> _Count:
        blocks = measured.sweep.blocks
        uses = [outer_uses(block.uses(measured.sweep.traced)) for block in blocks]
        return cls(
            tuple(Sizes.of_uses(own) for own in uses if own),
            tuple(
                b.num_parameters for b, own in zip(blocks, uses, strict=True) if not own
            ),
            measured.examples.num_seeds,
            measured.num_parameters,
            measured.coupled,
            measured.sweep.direct or any(not block.places for block in blocks),
        )

    @property
    def num_blocks(self) -> int:
        return len(self.sizes) + len(self.others)

    def forward(self, rows: int) -> float:
        """Return the work of a forward pass."""
        outer = sum(s.positions * s.inputs * s.outputs for s in self.sizes)
        return rows * (outer + sum(self.others)) + _CALL * self.num_blocks

    def step(self, rows: int) -> float:
        """Return the work of a training step."""
        return 3 * self.forward(rows) + _LOOP

    def work(self, form: FisherForm) -> float:
        """Return the work of a measurement."""
        rows, count = form.num_rows, form.num_eigenvalues
        dim = min(rows * self.seeds, self.num_parameters)
        layers = self.num_blocks if form.layer_eigenvalues else 0
        if count == 0:
            return self._traces(rows)
        products = self._traces(rows) + self._product(rows) * (
            num_products(dim if count is None else int(count))
            + layers * num_products(form.layer_eigenvalues)
        )
        # half of a decomposition is bound by memory
        whole = 2.0 * dim**3 if count is None else self._iterations(dim, int(count))
        matrix = (
            self._matrix(rows)
            + whole
            + layers * self._iterations(dim, form.layer_eigenvalues)
        )
        return matrix if count is None else min(matrix, products)

    def _traces(self, rows: int) -> float:
        """A pass back for each seed, and what it adds at each block."""
        if self.coupled:
            return rows * self.seeds * 2 * self.forward(rows)
        passes = self.forward(rows) * (1 + self.seeds)
        contracted = sum(
            rows
            * min(
                self.seeds * s.positions * s.inputs * s.outputs,
                s.positions**2 * (s.inputs + self.seeds * s.outputs),
            )
            for s in self.sizes
        )
        calls = rows * self.seeds * self.num_blocks * _CALL if self.one_by_one else 0.0
        # as much again for what is done number by number
        return 2 * (passes + contracted) + calls

    def _product(self, rows: int) -> float:
        return 6 * self.forward(rows)

    def _matrix(self, rows: int) -> float:
        """Forming the Gram matrix, or that of parameters where they are fewer."""
        dim = rows * self.seeds
        if self.coupled:
            return dim * self._product(rows)
        if self.num_parameters < dim:
            gram = dim * self.num_parameters**2 / 2
        else:
            gram = sum(s.work(rows, self.seeds) for s in self.sizes)
            gram += sum(dim**2 * size / 2 for size in self.others)
        return self._traces(rows) + 1.6 * gram

    def _iterations(self, dim: int, count: int) -> float:
        # memory bounds a product with the matrix
        return 20.0 * dim**2 * num_products(count)

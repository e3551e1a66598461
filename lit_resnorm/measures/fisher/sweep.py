"""Backward passes over the probe batch: for each row and dual seed, to the layers.

Rows are taken in chunks, the seeds of a chunk together (their backward pass is
vectorised over them), so that what is alive at a time is bounded and small pieces of
memory are used again. Nothing is differentiated to the weights: the passes end at the
outputs of the parameters' uses.

Shapes: N rows of this rank, K dual coefficients of a row (positions times the head's
coefficients), S seeds of one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lit_resnorm.measures.fisher.blocks import Leavings, ParameterBlock, find_blocks
from lit_resnorm.measures.fisher.head import Head, WeightedExamples
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.fisher.parameter_uses import Use
from lit_resnorm.measures.fisher.recording import UseRecorder
from lit_resnorm.measures.passes.batches import take_rows
from lit_resnorm.measures.passes.untouched import Passes

Visit = Callable[[ParameterBlock, Leavings], None]
"""Takes a block and what a backward pass left at it."""


@dataclass(frozen=True)
class End:
    """Where a backward pass ends: the output of a use, or a parameter."""

    place: Tensor | GradientEdge
    shape: torch.Size


@dataclass
class Sweep:
    """Backward passes to the layers, for all rows of this rank.

    Valid where rows do not depend on each other: not in norm mode `train`.

    Attributes:
        network: What is measured.
        run: Runner of forward passes.
        examples: The probe batch.
        memory: Bytes that the gradients of one pass may take.
        blocks: All blocks of parameters, as the traced pass had them.
        traced: The uses of that pass, of one row.
        stacked: Whether rows can be told apart in every use, and run together.
        vectorised: Whether the backward pass runs for several seeds together.
    """

    network: Network
    run: Passes
    examples: WeightedExamples
    memory: int
    blocks: tuple[ParameterBlock, ...] = ()
    traced: list[Use] = field(default_factory=list)
    stacked: bool = True
    vectorised: bool = True

    def follow(self, recorder: UseRecorder, *, together: bool) -> None:
        """Take over what a recorded pass on one row found.

        Args:
            recorder: Of that pass.
            together: Whether rows can be told apart where several are run.
        """
        self.traced = recorder.uses
        self.blocks = find_blocks(
            recorder.uses, recorder.general, self.network.parameters
        )
        self.stacked = (
            together
            and all(block.places for block in self.blocks)
            and all(use.separable and use.shape[0] == 1 for use in recorder.uses)
        )

    def __call__(self, blocks: Sequence[ParameterBlock], visit: Visit) -> None:
        """Run the passes to some blocks' uses and show each what they left."""
        start, num_rows = 0, self.examples.num_rows
        size = self._rows_at_once(blocks)
        while start < num_rows:
            stop = min(num_rows, start + size) if self.stacked else start + 1
            if not self._chunk(slice(start, stop), blocks, visit):
                self.stacked = False
                continue
            start = stop

    @property
    def row_bytes(self) -> int:
        """Bytes of the outputs of all uses in a pass on one row."""
        return self._bytes(self.blocks)

    def _rows_at_once(self, blocks: Sequence[ParameterBlock]) -> int:
        return max(1, self.memory // (self._bytes(blocks) * self.examples.num_seeds))

    def _seeds_at_once(self, blocks: Sequence[ParameterBlock], num_rows: int) -> int:
        if not self.vectorised:
            return 1
        return max(1, self.memory // (self._bytes(blocks) * num_rows))

    def _bytes(self, blocks: Sequence[ParameterBlock]) -> int:
        """Return bytes of one row's gradients for one seed."""
        numbers = sum(
            sum(use.shape.numel() for use in block.uses(self.traced))
            if block.places
            else block.num_parameters
            for block in blocks
        )
        return max(1, numbers) * self.network.dtype.itemsize

    def _ends(
        self, blocks: Sequence[ParameterBlock], recorder: UseRecorder
    ) -> list[End]:
        ends: list[End] = []
        for block in blocks:
            ends += [
                End(recorder.edges[place], recorder.uses[place].shape)
                for place in block.places
            ]
            if not block.places:
                ends.append(
                    End(self.network.parameters[block.names[0]], block.shapes[0])
                )
        return ends

    def _chunk(
        self, rows: slice, blocks: Sequence[ParameterBlock], visit: Visit
    ) -> bool:
        """Run some rows; False where they could not be told apart."""
        count = rows.stop - rows.start
        recorder = UseRecorder(self.network.parameters)
        x = take_rows(self.examples.x, rows)

        def recorded() -> Tensor:
            with recorder:
                return self.network(x)

        output = self.run(recorded)
        if count > 1 and any(use.shape[0] != count for use in recorder.uses):
            return False
        if [u.names for u in recorder.uses] != [u.names for u in self.traced]:
            raise RuntimeError(
                "the forward pass used other parameters than that of the first row:"
                " its way depends on the data"
            )
        head = self.examples.head(output, rows)
        ends = self._ends(blocks, recorder)
        for seeds in slices(
            self.examples.num_seeds, self._seeds_at_once(blocks, count)
        ):
            grads = self._grads(output, ends, head.spread(self._units(head, seeds)))
            for block in blocks:
                own = [grads.pop(0) for _ in range(len(block.places) or 1)]
                uses = block.uses(recorder.uses)
                visit(block, Leavings(rows, seeds, uses, own))
        return True

    def _units(self, head: Head, seeds: slice) -> Tensor:
        """Return unit dual vectors, the same for each row: `(S, N, T, K)`."""
        num = self.examples.num_seeds
        eye = torch.eye(num, dtype=head.dtype, device=head.device)[seeds]
        shape = head.num_rows, -1, self.examples.num_coefficients
        return eye[:, None].expand(-1, head.num_rows, -1).reshape(len(eye), *shape)

    def _grads(
        self, output: Tensor, ends: Sequence[End], seeds: Tensor
    ) -> list[Tensor]:
        places: list[Any] = [end.place for end in ends]
        grads = self._together(output, places, seeds) if len(seeds) > 1 else None
        if grads is None:
            each = [
                torch.autograd.grad(
                    output, places, seed, retain_graph=True, allow_unused=True
                )
                for seed in seeds
            ]
            grads = tuple(
                None if parts[0] is None else torch.stack(parts)
                for parts in zip(*each, strict=True)
            )
        return [
            seeds.new_zeros(len(seeds), *end.shape) if grad is None else grad
            for end, grad in zip(ends, grads, strict=True)
        ]

    def _together(
        self, output: Tensor, places: list[Any], seeds: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        """Return the gradients for all seeds; None where they must be looped over.

        Custom backward functions and recurrent kernels may refuse, which nothing but
        trying tells. The loop gives the same values, or the error itself.
        """
        if not self.vectorised:
            return None
        with warnings.catch_warnings():
            # An operation without a batching rule is looped over: slower, no less.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                return torch.autograd.grad(
                    output,
                    places,
                    seeds,
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                )
            except (RuntimeError, NotImplementedError):
                self.vectorised = False
                return None


def slices(total: int, size: int) -> list[slice]:
    """Return consecutive slices of at most `size` that cover `total`."""
    return [slice(at, min(total, at + size)) for at in range(0, total, size)]

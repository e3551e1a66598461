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
import zlib
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
from lit_resnorm.measures.passes.progress import advanced
from lit_resnorm.measures.passes.untouched import MissedNormError, Passes

Visit = Callable[[ParameterBlock, Leavings], None]
"""Takes a block and what a backward pass left at it."""


class OtherWayError(Exception):
    """Rows take different ways through the network, on this rank or another."""


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
        direct: Whether each row is differentiated to all parameters, whatever way it
            takes.
        reached: Parameters without uses that the traced pass's output depends on.
    """

    network: Network
    run: Passes
    examples: WeightedExamples
    memory: int
    blocks: tuple[ParameterBlock, ...] = ()
    traced: list[Use] = field(default_factory=list)
    stacked: bool = True
    vectorised: bool = True
    direct: bool = False
    reached: frozenset[str] = frozenset()

    def follow(self, recorder: UseRecorder, output: Tensor, *, together: bool) -> None:
        """Take over what a recorded pass on one row found.

        Args:
            recorder: Of that pass.
            output: Of that pass.
            together: Whether rows can be told apart where several are run.
        """
        self.traced = recorder.uses
        self.blocks = find_blocks(
            recorder.uses, recorder.general, self.network.parameters
        )
        self.reached = self._found_apart(output)
        self.stacked = (
            together
            and all(block.places for block in self.blocks)
            and all(use.separable and use.shape[0] == 1 for use in recorder.uses)
        )

    def take_directly(self) -> None:
        """Differentiate each row to all parameters: for rows that take different ways.

        Exact whatever the way; gradients take as much memory as the parameters.
        """
        parameters = self.network.parameters
        self.traced = []
        self.blocks = find_blocks([], set(parameters), parameters)
        self.stacked, self.direct = False, True

    def ranks_agree(self) -> bool:
        """Return whether the traced rows of all ranks took the same way."""
        shards, device = self.examples.shards, self.network.device
        if shards.alone:
            return True
        uses = [(type(u).__name__, u.names, tuple(u.shape)) for u in self.traced]
        way = uses, [block.names for block in self.blocks], sorted(self.reached)
        digest = zlib.crc32(repr(way).encode())
        return shards.largest(digest, device) == -shards.largest(-digest, device)

    def __call__(self, blocks: Sequence[ParameterBlock], visit: Visit) -> None:
        """Run the passes to some blocks' uses and show each what they left.

        Raises:
            OtherWayError: On all ranks, if a row of one takes another way than the
                traced row. What was shown before is then of no use.
            MissedNormError: On all ranks, if a row passes by a batch norm.
        """
        found = 0
        try:
            self._all_rows(blocks, visit)
        except OtherWayError:
            found = 1
        except MissedNormError:
            found = 2
        found = self.examples.shards.largest(found, self.network.device)
        if found == 2:
            raise MissedNormError(type(self.network.model).__name__, self.run.norm_mode)
        if found:
            raise OtherWayError

    def _all_rows(self, blocks: Sequence[ParameterBlock], visit: Visit) -> None:
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
        recorder = UseRecorder({} if self.direct else self.network.parameters)
        x = take_rows(self.examples.x, rows)

        def recorded() -> Tensor:
            with recorder:
                return self.network(x)

        output = self.run(recorded)
        if count > 1 and any(use.shape[:1] != (count,) for use in recorder.uses):
            return False
        if not self.direct and not self._as_traced(recorder, output, count):
            raise OtherWayError
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
            passes = seeds.stop - seeds.start + (seeds.start == 0)
            advanced(2 * passes * count / self.examples.num_rows)
        return True

    def _as_traced(self, recorder: UseRecorder, output: Tensor, count: int) -> bool:
        """Return whether some rows took the way of the traced one."""
        if len(recorder.uses) != len(self.traced):
            return False
        for use, traced in zip(recorder.uses, self.traced, strict=True):
            shape = traced.shape if count == 1 else (count, *traced.shape[1:])
            if (type(use), use.names, use.shape) != (type(traced), traced.names, shape):
                return False
        loose = {block.names[0] for block in self.blocks if not block.places}
        return (
            not recorder.general - loose and self._found_apart(output) == self.reached
        )

    def _found_apart(self, output: Tensor) -> frozenset[str]:
        """Return which parameters without uses an output depends on.

        Custom functions take parameters in unseen; the graph has them.
        """
        by_uses = {n for block in self.blocks if block.places for n in block.names}
        others = {
            id(parameter): name
            for name, parameter in self.network.parameters.items()
            if name not in by_uses
        }
        if not others:
            return frozenset()
        return frozenset(others[i] for i in _graph_leaves(output) if i in others)

    def _units(self, head: Head, seeds: slice) -> Tensor:
        """Return unit dual vectors, the same for each row: `(S, N, T, K)`."""
        num = self.examples.num_seeds
        eye = torch.eye(num, dtype=head.dtype, device=head.device)[seeds]
        shape = head.num_rows, -1, self.examples.num_coefficients
        return eye[:, None].expand(-1, head.num_rows, -1).reshape(len(eye), *shape)

    def _grads(
        self, output: Tensor, ends: Sequence[End], seeds: Tensor
    ) -> list[Tensor]:
        if not output.requires_grad:  # this row's way meets no parameter
            return [seeds.new_zeros(len(seeds), *end.shape) for end in ends]
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


def _graph_leaves(output: Tensor) -> set[int]:
    """Return the identities of the leaves of an output's graph, and of None."""
    seen, leaves = set(), set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes += [after for after, _ in node.next_functions]
    return leaves


def slices(total: int, size: int) -> list[slice]:
    """Return consecutive slices of at most `size` that cover `total`."""
    return [slice(at, min(total, at + size)) for at in range(0, total, size)]

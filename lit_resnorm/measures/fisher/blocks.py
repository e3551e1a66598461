"""Parameters in blocks, what each block adds to the trace, and whose layer it is.

A block is a weight with its bias, or whatever else always enters the network together.

Shapes: N rows, S seeds of one backward pass, P parameters of the block, I inputs, O
outputs, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher.parameter_uses import OuterUse, Use, outer_rows
from lit_resnorm.measures.passes.sites import owner_name, owner_site
from lit_resnorm.measures.passes.tracing import trace


@dataclass(frozen=True)
class ParameterBlock:
    """Parameters that enter the network together.

    Attributes:
        names: The parameters.
        shapes: Their shapes.
        places: Which of a pass's uses are theirs; none where they are used in ways
            without a formula, and their gradients are taken one row at a time.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    places: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Number P of parameters."""
        return sum(shape.numel() for shape in self.shapes)

    def uses(self, uses: Sequence[Use]) -> list[Use]:
        """Return this block's among the uses of a pass."""
        return [uses[place] for place in self.places]

    def rows(self, left: Leavings) -> Tensor:
        """Return the block's gradients, shape `(N, S, P)`."""
        if not self.places:
            return left.grads[0].reshape(1, len(left.grads[0]), -1)
        rows = [use.rows(grad, left.num_rows) for use, grad in left.pairs()]
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(dim=0)

    def trace(self, left: Leavings) -> Tensor:
        """Return the sum of the block's squared gradients, 0-d float64.

        Where positions are few it comes from T x T inner products over positions.
        """
        outer = outer_uses(left.uses)
        if not outer:
            return _squares(self.rows(left))
        inputs, right_NSOT = left.inputs(), left.right()
        n, s, o, t = right_NSOT.shape
        num_inputs = outer[0].num_inputs
        dense = inputs.is_floating_point()
        if dense and t == 1:
            squares_N = right_NSOT.square().sum(dim=(1, 2, 3))
            return (inputs.square().sum(dim=(1, 2)) * squares_N).sum(
                dtype=torch.float64
            )
        if dense and t * (num_inputs + s * o) > s * o * num_inputs:
            return _squares(outer_rows(inputs, right_NSOT, num_inputs))
        flat = right_NSOT.reshape(n, s * o, t)
        inner_NTT = torch.stack([left_products(row[None], row)[0] for row in inputs])
        return (torch.bmm(flat, inner_NTT.to(flat)) * flat).sum(dtype=torch.float64)


@dataclass(frozen=True)
class Leavings:
    """What a backward pass over some rows and seeds left at a block.

    Attributes:
        rows: Which of this rank's rows.
        seeds: Which dual coefficients of each.
        uses: The block's uses in the pass.
        grads: Gradients of their outputs, each `(S, *shape)`; where the block has no
            uses, of the parameter itself.
    """

    rows: slice
    seeds: slice
    uses: Sequence[Use]
    grads: Sequence[Tensor]

    @property
    def num_rows(self) -> int:
        """Number N of rows."""
        return self.rows.stop - self.rows.start

    def pairs(self) -> Iterator[tuple[Use, Tensor]]:
        """Return each use with its gradient."""
        return zip(self.uses, self.grads, strict=True)

    def inputs(self) -> Tensor:
        """Return the inputs of outer uses, `(N, I, T)`, over all uses' positions."""
        uses = outer_uses(self.uses)
        return _joined([use.left(use.input, self.num_rows) for use in uses])

    def right(self) -> Tensor:
        """Return the output gradients of outer uses, `(N, S, O, T)`, likewise."""
        return _joined(
            [
                use.right(grad, self.num_rows)
                for use, grad in self.pairs()
                if isinstance(use, OuterUse)
            ]
        )


def outer_uses(uses: Sequence[Use]) -> list[OuterUse]:
    """Return the uses that are outer products: all of a block's or none."""
    return [use for use in uses if isinstance(use, OuterUse)]


def left_products(left_MIT: Tensor, left_IT: Tensor) -> Tensor:
    """Return the inner products of inputs at all positions, shape `(M, T', T)`.

    Args:
        left_MIT: Of M rows, as :meth:`OuterUse.left` gives them: `(M, I, T')`, or
            indices `(M, T')`.
        left_IT: Of one row.
    """
    if left_MIT.is_floating_point():
        return torch.matmul(left_MIT.transpose(1, 2), left_IT)
    return (left_MIT[:, :, None] == left_IT) & (left_IT >= 0)


def find_blocks(
    uses: Sequence[Use], general: set[str], parameters: Mapping[str, Tensor]
) -> tuple[ParameterBlock, ...]:
    """Return the blocks of the parameters that a pass used, in order of first use.

    Parameters that enter together at one place and apart at another, or in two kinds
    of use (a tied embedding and read-out), have no common formula: each is a block of
    its own, without uses.
    """
    places: dict[tuple[str, ...], list[int]] = {}
    for place, use in enumerate(uses):
        places.setdefault(use.names, []).append(place)
    loose = set(general)
    for names, at in places.items():
        shared = any(set(names) & set(other) for other in places if other != names)
        if shared or len({_kind(uses[place]) for place in at}) > 1:
            loose.update(names)
    while linked := {n for k in places if loose & set(k) for n in k} - loose:
        loose |= linked
    blocks = [
        ParameterBlock(names, tuple(parameters[n].shape for n in names), tuple(at))
        for names, at in places.items()
        if not loose & set(names)
    ]
    blocks += [
        ParameterBlock((n,), (p.shape,), ())
        for n, p in parameters.items()
        if n in loose
    ]
    return tuple(blocks)


def layers_by_site(
    model: nn.Module, blocks: Sequence[ParameterBlock], forward: Callable[[], Any]
) -> dict[str, tuple[ParameterBlock, ...]]:
    """Return the blocks of each parameter-owning module, by site, in order.

    A module is named by its first application. One that is no site itself takes the
    number of the first site inside it (a vision transformer with its class token), or
    of the site that it is a part of (the output projection within an attention).

    Args:
        model: Its submodules own the parameters.
        blocks: All blocks; each belongs to the owner of its first parameter.
        forward: One pass of the model, on a few examples.
    """
    sites = trace(model, forward)
    owned = _by_owner(blocks)
    root = type(model).__name__.lower()
    named = {owner_site(owner, root, sites): tuple(b) for owner, b in owned.items()}
    return dict(sorted(named.items()))


def layers_by_registration(
    model: nn.Module, blocks: Sequence[ParameterBlock]
) -> dict[str, tuple[ParameterBlock, ...]]:
    """Return the blocks of each parameter-owning module, by its place among these.

    For networks whose rows take different ways, and have no one order of execution.
    """
    root = type(model).__name__.lower()
    owned = _by_owner(blocks)
    return {f"{i:03d}.{o or root}": tuple(b) for i, (o, b) in enumerate(owned.items())}


def _by_owner(blocks: Sequence[ParameterBlock]) -> dict[str, list[ParameterBlock]]:
    owned: dict[str, list[ParameterBlock]] = {}
    for block in blocks:
        owned.setdefault(owner_name(block.names[0]), []).append(block)
    return owned


def _kind(use: Use) -> tuple[object, ...]:
    if isinstance(use, OuterUse):
        return type(use), use.num_inputs, use.num_outputs
    return (type(use),)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _squares(rows: Tensor) -> Tensor:
    # Each seed's squares in the rows' own precision, their sum in float64.
    return rows.square().sum(dim=-1).sum(dtype=torch.float64)

"""Whether residual blocks refine: what each does to the loss and to the read-out.

Dimensions: B examples of this rank, N of all, S additions, K read-outs, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.losses.outcomes import Classified, OutputJudge
from lit_resnorm.measures.passes.batches import (
    Forward,
    mapped,
    num_rows,
    occupied,
    take_rows,
)
from lit_resnorm.measures.passes.example_dims import example_rows
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.sites import Site, Visitor, visiting
from lit_resnorm.measures.passes.untouched import Passes, Reduce, identity, untouched
from lit_resnorm.measures.residual_blocks import (
    Replacing,
    ResidualBlocks,
    operands,
    residual_blocks,
)

SMALLEST_GRADIENT = 1e-12
"""Norm below which a gradient of an example has no direction."""

BORDERLINE = 0.1
"""Probability by which the class of a borderline example is ahead, or behind."""


@dataclass(frozen=True)
class ReadOut:
    """What the head makes of one hidden state, over the probe batch; 0-d float64.

    Attributes:
        loss: Mean loss of the examples.
        accuracy: Share of labels that are right; None where targets are no classes.
        borderline_accuracy: Of the borderline labels; None also where there is none.
        borderline_loss: Mean of `-log p` of their class.
        borderline_entropy: Mean entropy of their probabilities, in nats.
    """

    loss: Tensor
    accuracy: Tensor | None = None
    borderline_accuracy: Tensor | None = None
    borderline_loss: Tensor | None = None
    borderline_entropy: Tensor | None = None


@dataclass(frozen=True)
class BlockInference:
    """What one residual block does; 0-d float64.

    Attributes:
        name: The site of its addition.
        cosine: Mean over examples of the cosine between branch and gradient; None where
            the branch of every example is 0. NaN where no example has a gradient.
        ratio: Mean over examples of the norm of the branch over that of the skip;
            examples whose skip is 0 have none.
        excluded: Share of the examples that the cosine leaves out: gradients below
            `SMALLEST_GRADIENT`, branches of 0.
        readout: What the head makes of the state after the block; None where the head
            doesn't take it.
        drop: What comes out of the network without the block; None where not asked for.
    """

    name: str
    cosine: Tensor | None
    ratio: Tensor
    excluded: Tensor
    readout: ReadOut | None = None
    drop: ReadOut | None = None


@dataclass(frozen=True)
class IterativeInference:
    """What the residual blocks of a network do, in the order of execution.

    Attributes:
        blocks: The blocks.
        whole: What the network itself makes of the probe batch.
        borderline: Share of the labels that are borderline; None where targets are no
            classes.
    """

    blocks: tuple[BlockInference, ...]
    whole: ReadOut
    borderline: Tensor | None

    def __getitem__(self, name: str) -> BlockInference:
        """Return a block by the name of its addition."""
        return {block.name: block for block in self.blocks}[name]


def iterative_inference(
    model: nn.Module,
    batch: Any,
    *,
    sites: str | ResidualBlocks = "",
    forward: Forward = nn.Module.__call__,
    judge: OutputJudge | None = None,
    norm_mode: str = "frozen",
    readout: bool = True,
    drop: bool = True,
    num_chunks: int = 1,
    reduce: Reduce = identity,
) -> IterativeInference:
    r"""Return what each residual block does to the loss and to the read-out.

    .. math:: \cos_l = \frac1N \sum_n \frac{F_l(h_n) \cdot g_n}{|F_l(h_n)|\,|g_n|},
              \qquad g_n = \frac{\partial L_n}{\partial h_n^l}

    where the block adds :math:`F_l(h)` to its input :math:`h^l` and :math:`L_n` is the
    loss of example n: negative where the block goes down the loss, to first order. A
    feature map is one vector. Exact; one forward and one backward pass. Where the skip
    is computed (a projection) the gradient is that at its result.

    The read-out puts the state after a block in the place of the last block's: the
    network's own head judges it, its batch norm by the statistics of its own input
    (each state's own in mode `train`). Without a block means that its addition gives
    what skips the branch: one forward pass a block.

    Borderline are labels whose probability is at most `BORDERLINE` ahead of, or behind,
    the likeliest other class's at the network's output; where they stand at each
    read-out says whether the last blocks decide them.

    Source: Jastrzebski et al. (2018), arXiv 1710.04773, sections 3 and 4. That skips
    are compared with the branch before any activation behind the addition is ours.

    Args:
        model: Any module; it is left as it was, and frozen parameters are no hindrance.
        batch: This rank's examples, with their targets; may be empty on some ranks. In
            mode `train` every rank has all.
        sites: A pattern searched in the names of additions, or `residual_blocks`.
        forward: Runs the model on the batch.
        judge: Gives losses and labels.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        readout: Whether the head judges hidden states.
        drop: Whether blocks are left out, one at a time.
        num_chunks: Passes that the examples are spread over.
        reduce: Sums a tensor over ranks.

    Raises:
        ValueError: If an option can't be right, a pattern matches nothing, there is no
            loss, or all ranks together hold no example.
    """
    if num_chunks < 1 or (num_chunks > 1 and norm_mode == "train"):
        raise ValueError(
            f"num_chunks is {num_chunks}; it must be at least 1, and 1 where norm_mode"
            " train couples all examples"
        )
    blocks = sites
    if not isinstance(blocks, ResidualBlocks):
        blocks = residual_blocks(model, batch, sites=blocks, forward=forward)
    reduce = identity if norm_mode == "train" else reduce
    with untouched(model, norm_mode=norm_mode, reduce=reduce) as run:
        measuring = _Measuring(
            model, blocks, forward, judge or OutputJudge(), run, readout, drop
        )
        parts = measuring.chunks(batch, num_chunks)
    rows_BV = torch.cat(parts)
    shards = Shards.of_batch(num_rows(batch), reduce, rows_BV.device)
    rows_NV = shards.gather(rows_BV if num_rows(batch) else rows_BV[:0])
    if not len(rows_NV):
        raise ValueError("the probe batch holds no example on any rank")
    return measuring.summary(rows_NV)


@dataclass
class _Measuring:
    """Passes over the probe batch, and what they give of each example.

    Every pass gives columns, a row an example: `widths` says of what.
    """

    model: nn.Module
    blocks: ResidualBlocks
    forward: Forward
    judge: OutputJudge
    run: Passes
    readout: bool
    drop: bool
    classes: bool = False
    widths: dict[str, int] = field(default_factory=dict)

    def chunks(self, batch: Any, num_chunks: int) -> list[Tensor]:
        """Return the columns of each chunk of examples."""
        filled, empty = occupied(batch)
        if num_chunks > 1:  # statistics of the batch are those of all chunks
            with torch.no_grad():
                self.run(lambda: self.forward(self.model, filled), empty=empty)
        size = -(-num_rows(filled) // num_chunks)
        return [
            self._columns(take_rows(filled, slice(first, first + size)), empty)
            for first in range(0, num_rows(filled), size)
        ]

    def _columns(self, batch: Any, empty: bool) -> Tensor:
        columns: dict[str, Tensor] = {}
        visitor = _Additions(self.blocks, num_rows(batch), keep=self.readout)
        output = self._with_gradients(batch, visitor, empty)
        losses_B = self.judge.losses(self.model, output, batch)
        self._check_losses(losses_B, batch)
        columns |= visitor.columns(losses_B)
        own = self.judge.classified(self.model, output, batch)
        self.classes = own is not None
        columns["whole"] = _outcomes(losses_B, own, own)
        with torch.no_grad():
            if self.readout and self.blocks.last is not None:
                columns |= self._read(batch, visitor.outputs, own)
            if self.drop:
                for site in self.blocks.sites:
                    out = self._replaced(batch, site, Replacing())
                    columns[f"drop/{site.name}"] = self._outcomes_of(out, batch, own)
        self.widths = {name: part.shape[1] for name, part in columns.items()}
        return torch.cat([part.detach().double() for part in columns.values()], 1)

    def _with_gradients(self, batch: Any, visitor: Visitor, empty: bool) -> Any:
        """Return the output, differentiable to all hidden states."""
        frozen = {
            name: parameter.detach().requires_grad_()
            for name, parameter in self.model.named_parameters()
            if not parameter.requires_grad and parameter.is_floating_point()
        }
        rows = mapped(_differentiable, batch)

        def visited() -> Any:
            with visiting(self.model, self.blocks.sites, visitor):
                return self.forward(self.model, rows)

        with with_weights(self.model, frozen):
            return self.run(visited, empty=empty)

    def _check_losses(self, losses_B: Tensor, batch: Any) -> None:
        if losses_B.shape != (num_rows(batch),):
            raise ValueError(
                f"the loss of {num_rows(batch)} examples has shape"
                f" {tuple(losses_B.shape)}: give loss_fn, with a loss an example"
            )

    def _read(
        self, batch: Any, states: dict[str, Tensor], own: Classified | None
    ) -> dict[str, Tensor]:
        """Return what the head makes of each state that it takes."""
        last = self.blocks.last
        if last is None:
            return {}
        names = self.blocks.fitting
        found = {}
        dim = self.blocks.dims[last.name]
        at_once = self.blocks.together and self.run.norm_mode != "train"
        for group in [names] if at_once else [(name,) for name in names]:
            joined = torch.cat([states[name] for name in group], dim)
            output = self._replaced(batch, last, Replacing(joined))
            for name, part in zip(group, output.chunk(len(group)), strict=True):
                found[f"readout/{name}"] = self._outcomes_of(part, batch, own)
        return found

    def _replaced(self, batch: Any, site: Site, visitor: Replacing) -> Any:
        def visited() -> Any:
            with visiting(self.model, [site], visitor):
                return self.forward(self.model, batch)

        return self.run(visited)

    def _outcomes_of(self, output: Any, batch: Any, own: Classified | None) -> Tensor:
        losses_B = self.judge.losses(self.model, output, batch)
        return _outcomes(
            losses_B, self.judge.classified(self.model, output, batch), own
        )

    def summary(self, rows_NV: Tensor) -> IterativeInference:
        """Return what all examples together say."""
        names, widths = [*self.widths], [*self.widths.values()]
        by_name = dict(zip(names, rows_NV.split(widths, 1), strict=True))
        whole = self._read_out(by_name["whole"])
        near = None
        if self.classes:
            _, counts, _, num_near, *_ = by_name["whole"].sum(0)
            near = num_near / counts
        return IterativeInference(
            tuple(
                _block_of_rows(
                    site.name,
                    by_name[site.name],
                    *(
                        self._read_out(found) if found is not None else None
                        for found in (
                            by_name.get(f"{kind}/{site.name}")
                            for kind in ("readout", "drop")
                        )
                    ),
                )
                for site in self.blocks.sites
            ),
            whole,
            near,
        )

    def _read_out(self, rows_NV: Tensor) -> ReadOut:
        loss = rows_NV[:, 0].mean()
        if not self.classes:
            return ReadOut(loss)
        _, counts, right, num_near, *near = rows_NV.sum(0)
        if not num_near:
            return ReadOut(loss, right / counts)
        return ReadOut(loss, right / counts, *(total / num_near for total in near))


def _differentiable(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    # a copy, which the network may overwrite
    return leaf.detach().requires_grad_().clone()


def _outcomes(
    losses_B: Tensor, found: Classified | None, own: Classified | None
) -> Tensor:
    """Return columns of losses, and of labels where there are classes.

    Args:
        losses_B: Losses of the examples.
        found: Predicted at this output.
        own: Predicted at the network's output, which says what is borderline.
    """
    losses_B = losses_B.detach().double()
    if found is None or own is None:
        return losses_B[:, None]
    near_BT = ((own.own - own.other).abs() <= BORDERLINE) * own.counts
    values = (
        found.counts,
        found.right * found.counts,
        near_BT,
        found.right * near_BT,
        torch.where(near_BT > 0, -found.own.log(), 0.0),
        found.entropy * near_BT,
    )
    return torch.stack([losses_B, *(value.sum(1) for value in values)], 1)


def _block_of_rows(
    name: str, rows_N4: Tensor, readout: ReadOut | None, drop: ReadOut | None
) -> BlockInference:
    dot_N, branch_N, skip_N, gradient_N = rows_N4.unbind(1)
    still_N = branch_N == 0
    left_out_N = (gradient_N < SMALLEST_GRADIENT) | still_N
    cosines = (dot_N / (branch_N * gradient_N))[~left_out_N]
    return BlockInference(
        name,
        None if bool(still_N.all()) else cosines.mean(),
        (branch_N / skip_N)[skip_N != 0].mean(),
        left_out_N.double().mean(),
        readout,
        drop,
    )


class _Additions(Visitor):
    """Sees branch and skip of each addition, and where its gradient is found.

    Args:
        blocks: The additions.
        num: Number of examples.
        keep: Whether outputs that the head takes are kept.
    """

    def __init__(self, blocks: ResidualBlocks, num: int, *, keep: bool) -> None:
        self.blocks = blocks
        self.num = num
        self.keep = keep
        self.outputs: dict[str, Tensor] = {}
        self._branches: dict[str, Tensor] = {}
        self._skips: dict[str, Tensor] = {}
        self._edges: dict[str, GradientEdge | None] = {}

    def before(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skip, branch = operands(site, args, kwargs)
        # copies: an addition in place overwrites one of the two
        self._branches[site.name] = self._rows(site, branch.detach()).clone()
        self._skips[site.name] = _lengths(self._rows(site, skip.detach()))
        state = args[1] if site.skip == 1 else args[0]
        edge = get_gradient_edge(state) if state.requires_grad else None
        self._edges[site.name] = edge

    def after(
        self,
        site: Site,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        output: Any,
    ) -> None:
        if self.keep and site.name in self.blocks.fitting:
            self.outputs[site.name] = output.detach().clone()

    def columns(self, losses_B: Tensor) -> dict[str, Tensor]:
        """Return dot product, and norms of branch, skip and gradient, by addition."""
        edges = {name: edge for name, edge in self._edges.items() if edge is not None}
        found: Sequence[Tensor | None] = ()
        if edges and losses_B.requires_grad:
            found = torch.autograd.grad(
                losses_B.sum(), [*edges.values()], allow_unused=True
            )
        gradients = dict(zip(edges, found, strict=True)) if found else {}
        columns = {}
        for site in self.blocks.sites:
            branch_BD = self._branches[site.name].double()
            gradient = gradients.get(site.name)
            if gradient is None:
                gradient_BD = torch.zeros_like(branch_BD)
            else:
                gradient_BD = self._rows(site, gradient).double()
            values = (
                (branch_BD * gradient_BD).sum(1),
                _lengths(branch_BD),
                self._skips[site.name],
                _lengths(gradient_BD),
            )
            columns[site.name] = torch.stack(values, 1)
        return columns

    def _rows(self, site: Site, tensor: Tensor) -> Tensor:
        return example_rows(tensor, self.blocks.dims[site.name], self.num)


def _lengths(rows_BD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows_BD, dim=1, dtype=torch.float64)

"""Whether the norms of hidden states and of gradients stay those of input and error.

Dimensions: B examples of this rank, N of all, I inputs, O outputs and T positions of a
weight's use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher.blocks import ParameterBlock, layers_by_site
from lit_resnorm.measures.fisher.parameter_uses import EmbeddingUse, OuterUse
from lit_resnorm.measures.fisher.recording import UseRecorder
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.passes.batches import (
    Forward,
    leaves,
    num_rows,
    occupied,
    take_rows,
)
from lit_resnorm.measures.passes.example_dims import example_dims, example_rows
from lit_resnorm.measures.passes.flow import follow
from lit_resnorm.measures.passes.sites import (
    Site,
    SiteKind,
    Visitor,
    first_tensor,
    select,
    visiting,
)
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import Passes, Reduce, identity, untouched

SMALLEST_ERROR = 1e-12
"""Norm of the loss's gradient at the output below which an example is left out."""

_HIDDEN: tuple[SiteKind, ...] = ("activation", "addition")
_GRADIENT_NUMBERS = 1 << 24
"""Of gradients of single examples that are formed at a time."""


@dataclass(frozen=True)
class NormRatio:
    """Ratios of norms over examples; 0-d float64.

    Attributes:
        mean: Their mean.
        deviation: Their largest distance from 1.
    """

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class NormPreservation:
    """What becomes of norms on the way through a network and back.

    Attributes:
        hidden: By site, norms of hidden states over those of inputs.
        gradient: By layer, norms of gradients of its weights over those of input times
            error.
        excluded: Share of the examples that the gradients leave out, 0-d float64.
    """

    hidden: dict[str, NormRatio]
    gradient: dict[str, NormRatio]
    excluded: Tensor


@dataclass(frozen=True)
class NormSites:
    """Where norms are taken.

    Attributes:
        hidden: Sites of hidden states.
        dims: By site the dimension of its output that counts examples.
        inputs: Which leaves of a batch are inputs, where they are numbers.
        embeddings: Sites whose outputs are the inputs, where those are indices.
        layers: By site of a layer the names of its trainable weight matrices.
    """

    hidden: tuple[Site, ...]
    dims: dict[str, int]
    inputs: tuple[int, ...]
    embeddings: tuple[Site, ...]
    layers: dict[str, tuple[str, ...]]


def norm_sites(
    model: nn.Module,
    x: Any,
    *,
    sites: str = "",
    forward: Forward = nn.Module.__call__,
) -> NormSites:
    """Return where the norms of a network are taken, as a pass on two examples shows.

    Hidden states are the outputs of activations and residual additions; layers are
    modules with a trainable weight matrix, embeddings aside.

    Args:
        model: Any module; it is left as it was.
        x: A batch of which two examples are run.
        sites: Pattern searched in the names of both.
        forward: Runs the model on a batch.

    Raises:
        ValueError: If the pattern matches nothing, or the network has no input of
            numbers and no embedding.
    """
    few = take_rows(occupied(x)[0], slice(2))
    recorder = UseRecorder(_weights(model))

    def recorded() -> None:
        with recorder:
            forward(model, few)

    with untouched(model, norm_mode="eval") as run:
        run(recorded)
        with torch.no_grad():
            traced = run(lambda: trace(model, lambda: forward(model, few)))
            flow = run(lambda: follow(model, few, lambda: forward(model, few), ()))
            layers = _weight_layers(
                model, recorder, lambda: run(lambda: forward(model, few))
            )
    hidden = select(traced, kinds=_HIDDEN)
    names = [*(site.name for site in hidden), *layers]
    if names and not any(re.search(sites, name) for name in names):
        raise ValueError(f"sites is {sites!r}, which matches none of {names[:40]}")
    hidden = tuple(site for site in hidden if re.search(sites, site.name))
    layers = {name: own for name, own in layers.items() if re.search(sites, name)}
    inputs = tuple(
        place
        for place, leaf in enumerate(leaves(few))
        if place in flow.inputs and isinstance(leaf, Tensor) and leaf.ndim
        if leaf.is_floating_point()
    )
    embeddings = () if inputs else select(traced, ops=("embedding", "embeddingbag"))
    dims = example_dims(model, few, (*hidden, *embeddings), forward)
    embeddings = tuple(site for site in embeddings if site.name in dims)
    if not inputs and not embeddings:
        raise ValueError(
            f"{type(model).__name__} takes no numbers of the batch and has no embedding"
            " of them, so that there is no norm of an input"
        )
    readable = tuple(site for site in hidden if site.name in dims)
    return NormSites(readable, dims, inputs, embeddings, layers)


def _weight_layers(
    model: nn.Module, recorder: UseRecorder, forward: Callable[[], Any]
) -> dict[str, tuple[str, ...]]:
    """Return by site the weights that multiply what comes in.

    Embedding tables are looked up, and positions and class tokens are added.
    """
    own = _weights(model)
    multiplied = {
        name
        for use in recorder.uses
        if isinstance(use, OuterUse) and not isinstance(use, EmbeddingUse)
        for name in use.names
    }
    kernels = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    multiplied |= {
        name
        for name in recorder.general
        if own[name].ndim == 2 or id(own[name]) in kernels
    }
    blocks = [
        ParameterBlock((name,), (weight.shape,), ())
        for name, weight in own.items()
        if name in multiplied
    ]
    if not blocks:
        return {}
    by_site = layers_by_site(model, blocks, forward)
    return {
        site: tuple(name for block in own for name in block.names)
        for site, own in by_site.items()
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weight matrices by name, kernels among them."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1
    }


def norm_preservation(
    model: nn.Module,
    batch: Any,
    *,
    sites: str | NormSites = "",
    forward: Forward = nn.Module.__call__,
    judge: OutputJudge | None = None,
    norm_mode: str = "frozen",
    num_chunks: int = 1,
    reduce: Reduce = identity,
) -> NormPreservation:
    r"""Return what becomes of norms on the way through a network and back.

    .. math:: \frac{|h^l_n|}{|x_n|}, \qquad
              \frac{|\partial \ell_n / \partial W^l|_F}{|x_n|\,|\delta_n|}

    for each example n, with :math:`\delta` the loss's gradient at the network's output.
    Both tend to 1 with the width in nets of constant width whose weights are He's, with
    an error of the order of the root of depth over width. Weights have no bias here. A
    feature map is one vector. Exact; one forward and one backward pass, and a sum over
    positions for the gradient of each weight and example.

    Source: Arpit and Bengio (2019), arXiv 1901.03611.

    Args:
        model: Any module; it is left as it was.
        batch: This rank's examples, with their targets; may be empty on some ranks.
        sites: A pattern searched in the names of sites, or `norm_sites`.
        forward: Runs the model on the batch.
        judge: Gives the losses.
        norm_mode: What batch norm does: `frozen` or `eval`.
        num_chunks: Passes that the examples are spread over.
        reduce: Sums a tensor over ranks.

    Raises:
        ValueError: If an option can't be right, a pattern matches nothing, there is no
            loss, or all ranks together hold no example.
    """
    if norm_mode == "train":
        raise ValueError(
            f"norm_mode is {norm_mode!r}; a gradient of one example alone has no batch"
            " statistics: use frozen or eval"
        )
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; it must be at least 1")
    found = sites
    if not isinstance(found, NormSites):
        found = norm_sites(model, batch, sites=found, forward=forward)
    filled, empty = occupied(batch)
    with untouched(model, norm_mode=norm_mode, reduce=reduce) as run:
        measuring = _Norms(model, found, forward, judge or OutputJudge(), run)
        with torch.no_grad():  # statistics of the batch, before any part of it
            run(lambda: forward(model, filled), empty=empty)
        size = -(-num_rows(filled) // num_chunks)
        parts = []
        for first in range(0, num_rows(filled), size):
            rows = slice(first, first + size)
            parts += measuring.columns(take_rows(filled, rows))
    rows_BV = torch.cat(parts)
    shards = Shards.of_batch(num_rows(batch), reduce, rows_BV.device)
    rows_NV = shards.gather(rows_BV[: num_rows(batch)])
    if not len(rows_NV):
        raise ValueError("the probe batch holds no example on any rank")
    return _summary(found, rows_NV)


def _summary(sites: NormSites, rows_NV: Tensor) -> NormPreservation:
    x_N, error_N, *norms = rows_NV.unbind(1)
    hidden = norms[: len(sites.hidden)]
    left_out_N = (x_N == 0) | (error_N < SMALLEST_ERROR)
    scale_N = x_N * error_N
    return NormPreservation(
        {
            site.name: _ratio_of_norms((norm_N / x_N)[x_N != 0])
            for site, norm_N in zip(sites.hidden, hidden, strict=True)
        },
        {
            name: _ratio_of_norms((norm_N / scale_N)[~left_out_N])
            for name, norm_N in zip(sites.layers, norms[len(hidden) :], strict=True)
        },
        left_out_N.double().mean(),
    )


def _ratio_of_norms(ratios_N: Tensor) -> NormRatio:
    if not len(ratios_N):
        nothing = ratios_N.new_tensor(torch.nan)
        return NormRatio(nothing, nothing)
    return NormRatio(ratios_N.mean(), (ratios_N - 1).abs().amax())


@dataclass
class _Norms:
    """Passes over the probe batch, and the norms that they give of each example.

    Attributes:
        by_row: Whether examples are run one at a time, as they can't be told apart in
            what the weights see.
    """

    model: nn.Module
    sites: NormSites
    forward: Forward
    judge: OutputJudge
    run: Passes
    by_row: bool = False
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        own = _weights(self.model)
        names = [name for names in self.sites.layers.values() for name in names]
        self.weights = {name: own[name] for name in names}

    def columns(self, batch: Any) -> list[Tensor]:
        """Return norms of examples: input, error, hidden states, weights' gradients."""
        if not self.by_row:
            columns = self._columns(batch)
            if columns is not None:
                return [columns]
            self.by_row = True
        found = []
        for row in range(num_rows(batch)):
            columns = self._columns(take_rows(batch, slice(row, row + 1)))
            if columns is None:
                raise RuntimeError("a single example can't be told apart from others")
            found.append(columns)
        return found

    def _columns(self, batch: Any) -> Tensor | None:
        """Return the norms of some examples; None where they can't be told apart."""
        num = num_rows(batch)
        visitor = _States(self.sites, num)
        recorder = UseRecorder(self.weights)

        def visited() -> Any:
            # the walk counts additions: it must not see those of the recorder
            visits = (*self.sites.hidden, *self.sites.embeddings)
            with recorder, visiting(self.model, visits, visitor):
                return self.forward(self.model, batch)

        output = self.run(visited)
        uses = recorder.uses
        mixed = any(use.shape[:1] != (num,) for use in uses) or recorder.general
        if num > 1 and mixed:
            return None
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the output of {type(self.model).__name__} is a"
                f" {type(output).__name__}, no tensor: give forward_fn"
            )
        leaf = output.detach().requires_grad_()
        losses_B = self.judge.losses(self.model, leaf, batch)
        if losses_B.shape != (num,):
            raise ValueError(
                f"the loss of {num} examples has shape {tuple(losses_B.shape)}: give"
                " loss_fn, with a loss an example"
            )
        (error,) = torch.autograd.grad(losses_B.sum(), leaf)
        loose = [name for name in self.weights if name in recorder.general]
        squares = self._squares(output, error, recorder, loose)
        error_B = _row_norms(error, num)
        columns = [visitor.input_norms(batch), error_B]
        columns += [visitor.norms[site.name] for site in self.sites.hidden]
        for names in self.sites.layers.values():
            total_B = torch.zeros_like(error_B)
            for name in names:
                total_B = total_B + squares.get(name, 0.0)
            columns.append(total_B.sqrt())
        return torch.stack(columns, 1)

    def _squares(
        self,
        output: Tensor,
        error: Tensor,
        recorder: UseRecorder,
        loose: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return squared norms of the gradients of examples, `(B,)`, by weight.

        Args:
            output: The network's output.
            error: The loss's gradient there.
            recorder: Of the pass.
            loose: Weights that are used in ways without a formula.
        """
        places: list[Any] = [*recorder.edges, *(self.weights[name] for name in loose)]
        if not places or not output.requires_grad:
            return {}
        grads = torch.autograd.grad(output, places, error, allow_unused=True)
        by_name: dict[str, list[tuple[OuterUse, Tensor]]] = {}
        for use, grad in zip(recorder.uses, grads, strict=False):
            name = use.names[0]
            if isinstance(use, OuterUse) and name not in loose and grad is not None:
                by_name.setdefault(name, []).append((use, grad))
        squares = {
            name: _squared_rows(own, len(error)) for name, own in by_name.items()
        }
        for name, grad in zip(loose, grads[len(recorder.uses) :], strict=True):
            if grad is not None:
                squares[name] = grad.double().square().sum().reshape(1)
        return squares


class _States(Visitor):
    """Takes the norms of hidden states and of embeddings."""

    def __init__(self, sites: NormSites, num: int) -> None:
        self.sites = sites
        self.num = num
        self.norms: dict[str, Tensor] = {}

    def after(
        self,
        site: Site,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        output: Any,
    ) -> None:
        found = first_tensor(output)
        if found is not None:
            rows = example_rows(found.detach(), self.sites.dims[site.name], self.num)
            self.norms[site.name] = _row_norms(rows, self.num)

    def input_norms(self, batch: Any) -> Tensor:
        """Return norms of the inputs of examples."""
        whole = leaves(batch)
        parts = [_row_norms(whole[place], self.num) for place in self.sites.inputs]
        parts += [self.norms[site.name] for site in self.sites.embeddings]
        return torch.stack(parts).square().sum(0).sqrt()


def _row_norms(values: Tensor, num: int) -> Tensor:
    rows = values.detach().reshape(num, -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _squared_rows(uses: Sequence[tuple[OuterUse, Tensor]], num: int) -> Tensor:
    """Return squared norms of the gradients of one weight, `(B,)`, over its uses.

    A gradient is the sum over positions of outer products of what comes in and the
    output's gradient; where positions are few their inner products give its norm.
    """
    left_BIT = torch.cat([use.left(use.input.detach(), num) for use, _ in uses], -1)
    right_BOT = torch.cat([use.right(grad[None], num)[:, 0] for use, grad in uses], -1)
    num_inputs, num_outputs = left_BIT.shape[1], right_BOT.shape[1]
    num_positions = left_BIT.shape[2]
    if num_positions == 1:
        squares = (part.double().square().sum((1, 2)) for part in (left_BIT, right_BOT))
        return next(squares) * next(squares)
    if num_positions * (num_inputs + num_outputs) < num_inputs * num_outputs:
        inner_BTT = torch.bmm(left_BIT.mT, left_BIT).double()
        return (inner_BTT * torch.bmm(right_BOT.mT, right_BOT)).sum((1, 2))
    size = max(1, _GRADIENT_NUMBERS // (num_inputs * num_outputs))
    pairs = zip(left_BIT.split(size), right_BOT.split(size), strict=True)
    parts = [torch.bmm(r, le.mT).double().square().sum((1, 2)) for le, r in pairs]
    return torch.cat(parts)

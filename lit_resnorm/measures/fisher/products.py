r"""Products with the Fisher matrix in its dual space, without forming it.

A vector of dual coefficients goes back to the parameters by reverse mode and forth to
the outputs by forward mode: :math:`u \mapsto R^\top J (J^\top R u)`. Nothing is assumed
of the network, not even that rows are independent.

Shapes: N rows of this rank, D dual coefficients of all ranks, B vectors in a block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lit_resnorm.measures.fisher.head import Head, WeightedExamples
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.passes.batches import take_rows
from lit_resnorm.measures.passes.progress import advanced
from lit_resnorm.measures.passes.untouched import Passes

WayForth = Callable[[list[Tensor], Tensor], None]
"""Takes tangents of the parameters and fills in each coefficient's product."""


@dataclass
class _Chunk:
    rows: slice
    output: Tensor
    head: Head
    # Zero dual coefficients and the parameters' gradients as functions of them.
    dual: Tensor | None = None
    grads: list[Tensor] = field(default_factory=list)


@dataclass
class Products:
    """Products with the Fisher matrix of the whole probe batch.

    Attributes:
        network: What is measured.
        run: Runner of forward passes.
        examples: The probe batch.
        rows_at_once: Rows of one pass; all of them where rows depend on each other.
        keep_graphs: Whether the graphs of the forward passes are kept between products.
        reverse_twice: Whether the way forth differentiates the way back, which is
            linear in the dual vector, in reverse mode, before it tries forward mode:
            faster for small layers, slower for convolutions. Operations may have a rule
            for one alone, or for neither.
        names: Parameters whose block is measured; all where empty.
    """

    network: Network
    run: Passes
    examples: WeightedExamples
    rows_at_once: int
    keep_graphs: bool
    reverse_twice: bool = False
    names: tuple[str, ...] = ()
    _ways: list[WayForth] = field(init=False)
    _proven: bool = False
    _graphs: list[_Chunk] = field(default_factory=list)

    def __call__(self, dual_DB: Tensor) -> Tensor:
        """Return the products with a block of dual vectors, float64."""
        products = []
        for dual_D in dual_DB.unbind(1):
            products.append(self._product(dual_D))
            advanced(6)
        return torch.stack(products, dim=1)

    def squared_lengths(self, dual_D: Tensor) -> dict[str, Tensor]:
        r"""Return each parameter's part of :math:`|J^\top R u|^2`, float64.

        Of this rank's part of u.
        """
        grads = self._back(dual_D)
        squares = [grad.square().sum(dtype=torch.float64) for grad in grads]
        return dict(zip(self._parameters(), squares, strict=True))

    def __post_init__(self) -> None:
        twice, forward = self._reverse_mode, self._forward_mode
        first = [twice, forward] if self.reverse_twice else [forward, twice]
        self._ways = [*first, self._each_coefficient]

    def _product(self, dual_D: Tensor) -> Tensor:
        shards = self.examples.shards
        grads = self._back(dual_D)
        if not shards.alone:
            flat = shards.reduce(torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([grad.numel() for grad in grads])
            grads = [p.view_as(g).to(g) for p, g in zip(parts, grads, strict=True)]
        result_D = shards.gather(self._forth(grads)).flatten()
        while not self._proven and len(self._ways) > 1:
            if self._proves(dual_D, result_D, grads):
                break
            del self._ways[0]
            result_D = shards.gather(self._forth(grads)).flatten()
        self._proven = True
        return result_D

    def _proves(
        self, dual_D: Tensor, result_D: Tensor, grads: Sequence[Tensor]
    ) -> bool:
        r"""Return whether :math:`u^\top F u = |J^\top R u|^2`, up to rounding.

        It fails where a way forth misses something without an error: forward mode a
        view of a parameter made beforehand, reverse mode a backward function that
        leaves the graph. All ranks come to the same answer.
        """
        dual_D = dual_D.to(result_D)
        squares = torch.stack([g.square().sum(dtype=torch.float64) for g in grads])
        apart = (dual_D @ result_D - squares.sum()).abs()
        # Rounding grows on its way through a network: a quarter of the digits.
        bound = self.network.eps**0.25
        return not bool(apart > bound * dual_D.norm() * result_D.norm())

    def _parameters(self) -> dict[str, Tensor]:
        everything = self.network.parameters
        return {name: everything[name] for name in self.names or everything}

    def _local(self, dual_D: Tensor) -> Tensor:
        examples = self.examples
        shape = examples.shards.total, -1, examples.num_coefficients
        own_NTK = dual_D.view(shape)[examples.shards.rows]
        return own_NTK.to(self.network.device, self.network.dtype)

    def _chunks(self) -> Iterator[_Chunk]:
        if self._graphs:
            yield from self._graphs
            return
        for rows, x in self._batches():
            with torch.enable_grad():
                output = self.run(lambda x=x: self.network(x))
            if not output.requires_grad:  # the rows' way meets no parameter
                continue
            chunk = _Chunk(rows, output, self.examples.head(output, rows))
            if self.keep_graphs:
                self._graphs.append(chunk)
            yield chunk

    def _batches(self) -> Iterator[tuple[slice, Any]]:
        num = self.examples.num_rows
        for start in range(0, num, self.rows_at_once):
            rows = slice(start, min(num, start + self.rows_at_once))
            yield rows, take_rows(self.examples.x, rows)

    def _back(self, dual_D: Tensor) -> list[Tensor]:
        parameters = list(self._parameters().values())
        own_NTK = self._local(dual_D)
        total: list[Tensor | None] = [None] * len(parameters)
        for chunk in self._chunks():
            grads = torch.autograd.grad(
                chunk.output,
                parameters,
                chunk.head.spread(own_NTK[chunk.rows]),
                retain_graph=self.keep_graphs,
                allow_unused=True,
            )
            total = [
                t if g is None else g if t is None else t + g
                for t, g in zip(total, grads, strict=True)
            ]
        return [
            torch.zeros_like(p) if t is None else t
            for t, p in zip(total, parameters, strict=True)
        ]

    def _forth(self, tangents: list[Tensor]) -> Tensor:
        examples = self.examples
        shape = examples.num_rows, examples.num_seeds
        while True:
            result = torch.zeros(shape, dtype=torch.float64, device=self.network.device)
            try:
                self._ways[0](tangents, result)
                return result
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a rule for this way
                if len(self._ways) == 1:
                    raise
                del self._ways[0]

    def _each_coefficient(self, tangents: list[Tensor], result: Tensor) -> None:
        """Take one backward pass a dual coefficient: slow, and nothing is needed."""
        parameters = list(self._parameters().values())
        for chunk in self._chunks():
            shape = (*self.examples.slots[chunk.rows].shape, -1)
            units = torch.eye(
                result[chunk.rows].numel(),
                dtype=self.network.dtype,
                device=self.network.device,
            )
            for place, unit in enumerate(units):
                grads = torch.autograd.grad(
                    chunk.output,
                    parameters,
                    chunk.head.spread(unit.view(shape)),
                    retain_graph=True,
                    allow_unused=True,
                )
                result[chunk.rows].view(-1)[place] = sum(
                    (grad * tangent).sum(dtype=torch.float64)
                    for grad, tangent in zip(grads, tangents, strict=True)
                    if grad is not None
                )

    @torch.no_grad()
    def _forward_mode(self, tangents: list[Tensor], result: Tensor) -> None:
        named = zip(self._parameters().items(), tangents, strict=True)
        with warnings.catch_warnings(), forward_ad.dual_level():
            # Some of torch's own rules are scripted, which it has deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            dual = {n: forward_ad.make_dual(p.detach(), t) for (n, p), t in named}
            for rows, x in self._batches():
                output = self.run(lambda x=x: self.network(x, dual))
                primal, tangent = forward_ad.unpack_dual(output)
                if tangent is not None:
                    collected = self.examples.head(primal, rows).collect(tangent)
                    result[rows] = collected.flatten(1).double()

    def _reverse_mode(self, tangents: list[Tensor], result: Tensor) -> None:
        parameters = self._parameters()
        named = dict(zip(parameters, tangents, strict=True))
        for chunk in self._chunks():
            if chunk.dual is None:
                shape = (*self.examples.slots[chunk.rows].shape, -1)
                zeros = chunk.output.new_zeros(
                    self.examples.num_seeds * chunk.output.shape[0]
                )
                chunk.dual = zeros.view(shape).requires_grad_()
                grads = torch.autograd.grad(
                    chunk.output,
                    list(parameters.values()),
                    chunk.head.spread(chunk.dual),
                    create_graph=True,
                    allow_unused=True,
                )
                chunk.grads = [
                    p.new_zeros(()) if g is None else g
                    for g, p in zip(grads, parameters.values(), strict=True)
                ]
            pairs = [
                (grad, tangent)
                for grad, tangent in zip(chunk.grads, named.values(), strict=True)
                if grad.requires_grad
            ]
            if not pairs:  # rows whose way meets none of the parameters
                continue
            (out,) = torch.autograd.grad(
                [grad for grad, _ in pairs],
                chunk.dual,
                [tangent for _, tangent in pairs],
                retain_graph=self.keep_graphs,
            )
            result[chunk.rows] = out.flatten(1).double()

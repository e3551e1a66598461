r"""Products with the Fisher matrix in its dual space, without forming it.

A vector of dual coefficients goes back to the parameters by reverse mode and forth to
the outputs by forward mode: :math:`u \mapsto R^\top J (J^\top R u)`. Nothing is assumed
of the network, not even that rows are independent.

Shapes: N rows of this rank, D dual coefficients of all ranks, B vectors in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lit_resnorm.measures.fisher.heads import Head
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.fisher.sweep import Examples
from lit_resnorm.measures.observe import Passes, take_rows


@dataclass
class _Chunk:
    rows: slice
    output: Tensor
    head: Head


@dataclass
class Products:
    """Products with the Fisher matrix of the whole probe batch.

    Attributes:
        network: What is measured.
        run: Runner of forward passes.
        examples: The probe batch.
        rows_at_once: Rows of one pass; all of them where rows depend on each other.
        keep_graphs: Whether the graphs of the forward passes are kept between products.
        names: Parameters whose block is measured; all where empty.
        count: Products formed so far.
    """

    network: Network
    run: Passes
    examples: Examples
    rows_at_once: int
    keep_graphs: bool
    names: tuple[str, ...] = ()
    count: int = 0
    _graphs: list[_Chunk] = field(default_factory=list)

    def __call__(self, dual_DB: Tensor) -> Tensor:
        """Return the products with a block of dual vectors, float64."""
        return torch.stack([self._product(u) for u in dual_DB.unbind(1)], dim=1)

    def squared_length(self, dual_D: Tensor) -> Tensor:
        r"""Return :math:`|J^\top R u|^2`, summed over ranks' parts of u, float64."""
        grads = self._back(dual_D)
        return torch.stack([g.square().sum(dtype=torch.float64) for g in grads]).sum()

    def _product(self, dual_D: Tensor) -> Tensor:
        self.count += 1
        shards = self.examples.shards
        grads = self._back(dual_D)
        if not shards.alone:
            flat = shards.reduce(torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([grad.numel() for grad in grads])
            grads = [p.view_as(g) for p, g in zip(parts, grads, strict=True)]
        return shards.gather(self._forth(grads)).flatten()

    def start(self, num_vectors: int, seed: int = 0) -> Tensor:
        r"""Return start vectors for the largest eigenvalues, shape `(D, B)`, float64.

        The largest eigenvectors of a Fisher matrix are close to directions that all
        examples share, so these are :math:`R^\top g` for random directions g of the
        output, with some noise that keeps every eigenvector within reach.
        """
        examples = self.examples
        noise = torch.Generator().manual_seed(seed)
        mixed_DB = torch.randn(
            examples.dim, num_vectors, generator=noise, dtype=torch.float64
        )
        columns = []
        for own_D in mixed_DB.to(self.network.device).unbind(1):
            shared = self._shared(noise)
            columns.append(
                shared / shared.norm().clamp_min(1e-300) + 0.3 * own_D / own_D.norm()
            )
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def _shared(self, generator: torch.Generator) -> Tensor:
        examples = self.examples
        shared = torch.zeros(
            examples.num_rows,
            examples.num_seeds,
            dtype=torch.float64,
            device=self.network.device,
        )
        direction: Tensor | None = None
        for chunk in self._chunks():
            if direction is None:
                size = chunk.output.shape[1:]
                direction = torch.randn(size, generator=generator).to(chunk.output)
            same = direction.expand_as(chunk.output)
            shared[chunk.rows] = chunk.head.collect(same).flatten(1).double()
        return examples.shards.gather(shared).flatten()

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
        num = self.examples.num_rows
        for start in range(0, num, self.rows_at_once):
            rows = slice(start, min(num, start + self.rows_at_once))
            x = take_rows(self.examples.x, rows)
            with torch.enable_grad():
                output = self.run(lambda x=x: self.network(x))
            chunk = _Chunk(rows, output, self.examples.head(output, rows))
            if self.keep_graphs:
                self._graphs.append(chunk)
            yield chunk

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

    @torch.no_grad()
    def _forth(self, tangents: list[Tensor]) -> Tensor:
        examples = self.examples
        result = torch.zeros(
            examples.num_rows,
            examples.num_seeds,
            dtype=torch.float64,
            device=self.network.device,
        )
        with forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(p.detach(), t)
                for (name, p), t in zip(
                    self._parameters().items(), tangents, strict=True
                )
            }
            for start in range(0, examples.num_rows, self.rows_at_once):
                rows = slice(start, min(examples.num_rows, start + self.rows_at_once))
                x = take_rows(examples.x, rows)
                output = self.run(lambda x=x: self.network(x, dual))
                primal, tangent = forward_ad.unpack_dual(output)
                if tangent is not None:
                    collected = examples.head(primal, rows).collect(tangent)
                    result[rows] = collected.flatten(1).double()
        return result

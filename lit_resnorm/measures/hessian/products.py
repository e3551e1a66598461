r"""Products with the Hessian of a loss, over the probe batch and all ranks.

H v is the gradient of :math:`v^\top \nabla L`: one backward pass through the graph of
the gradient, which is kept.

Shapes: P parameters, B vectors in a block, N rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher import Examinations, FisherOptions
from lit_resnorm.measures.fisher.measurement import Measurement, measurement
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.hessian.second_derivative import (
    ComposedWeightNorm,
    check_differentiable,
    functions_in,
    naming_operations,
)
from lit_resnorm.measures.losses.probe_loss import ProbeLoss, ShapedForward
from lit_resnorm.measures.passes.batches import Forward, network_output, take_rows
from lit_resnorm.measures.passes.untouched import Reduce, identity

# Bytes of the graph of a gradient, in those of all that layers put out.
_GRAPH_SIZE = 9

_APART = 0.2
"""Share of a product that differences of gradients may miss: what a backward that
leaves the graph misses is of the size of the whole."""


@dataclass(frozen=True, kw_only=True)
class HessianOptions:
    """What is measured of a Hessian, and how.

    Attributes:
        norm_mode: `frozen`, `eval` or `train`.
        num_eigenvalues: The largest k, with their signs.
        tol: Error of each, relative, but for a chance of 1e-6; None: of no matter.
        smallest_tol: Error of the smallest one, as a share of the largest less the
            smallest; None: it is not measured.
        num_trace_vectors: Random vectors of the trace's estimate; as many as there are
            parameters or more give it exactly, 0 none.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied, `(model, batch) -> output`.
        start: Vectors of an earlier measurement (`HessianSpectrum.vectors`); of use
            for several eigenvalues. The largest alone is certified by a Krylov space of
            a random vector, which finds it on the way.
        memory: Bytes up to which the graph of the gradient of all rows is kept from
            product to product. Beyond, rows are run in parts, for each product anew.
        examinations: What measurements of the same network found before.

    Raises:
        ValueError: If an option can't be right.
    """

    norm_mode: str = "frozen"
    num_eigenvalues: int = 1
    tol: float | None = 1e-3
    smallest_tol: float | None = 0.1
    num_trace_vectors: int = 10
    reduce: Reduce = identity
    forward: Forward = network_output
    start: Tensor | None = None
    memory: int = 2**30
    examinations: Examinations = field(default_factory=Examinations)

    def __post_init__(self) -> None:
        if self.num_eigenvalues < 1:
            raise ValueError(
                f"num_eigenvalues is {self.num_eigenvalues}; it must be at least 1"
            )
        if self.tol is not None and not 0 < self.tol < 1:
            raise ValueError(f"tol is {self.tol}; it must lie between 0 and 1")
        if self.smallest_tol is not None and not 0 < self.smallest_tol < 1:
            raise ValueError(
                f"smallest_tol is {self.smallest_tol}; it must lie between 0 and 1, or"
                " be None"
            )
        if self.num_trace_vectors < 0 or self.num_trace_vectors == 1:
            raise ValueError(
                f"num_trace_vectors is {self.num_trace_vectors}; it must be 0, or at"
                " least 2: one vector has no standard error"
            )


@contextmanager
def hessian_products(
    model: nn.Module, batch: Any, loss: ProbeLoss, options: HessianOptions
) -> Iterator[HessianProducts]:
    """Give the Hessian as an operator; the model is untouched afterwards."""
    forward = ShapedForward(options.forward)
    measuring = FisherOptions(
        output=loss.output,
        class_dim=loss.class_dim,
        norm_mode=options.norm_mode,
        num_eigenvalues=0,
        reduce=options.reduce,
        forward=forward,
        weights=loss.weights,
        loss_scale=loss.scale,
        memory=options.memory,
        examinations=options.examinations,
    )
    with measurement(model, batch, measuring) as measured:
        yield HessianProducts(measured, loss, forward)


class HessianProducts:
    """Products with the Hessian of the loss of the whole probe batch, over all ranks.

    Args:
        measured: The model and the batch.
        loss: The loss.
        forward: How the model is applied.

    Attributes:
        num_products: Vectors that were multiplied.
        coupled: Whether rows depend on each other, so that ranks can't hold them apart.
    """

    def __init__(
        self, measured: Measurement, loss: ProbeLoss, forward: ShapedForward
    ) -> None:
        self._measured, self._loss, self._forward = measured, loss, forward
        self._parameters = [*measured.sweep.network.parameters.values()]
        self._graphs: list[list[Tensor]] = []
        self.num_products = 0
        self.coupled = measured.coupled
        rows = max(1, measured.examples.num_rows)
        size = _GRAPH_SIZE * measured.sweep.row_bytes
        memory = measured.options.memory
        self._keep = measured.coupled or rows * size <= memory
        self._rows = rows if self._keep else max(1, memory // size)

    @property
    def network(self) -> Network:
        """What is measured."""
        return self._measured.sweep.network

    def __call__(self, vectors_PB: Tensor) -> Tensor:
        """Return the products with a block of vectors, float64."""
        self.num_products += vectors_PB.shape[1]
        return torch.stack([self._product(v) for v in vectors_PB.unbind(1)], dim=1)

    def _product(self, vector_P: Tensor) -> Tensor:
        parameters = self._parameters
        parts = vector_P.to(self.network.dtype).split([p.numel() for p in parameters])
        tangents = [
            part.view_as(p).to(p) for part, p in zip(parts, parameters, strict=True)
        ]
        total_P = torch.zeros(
            len(vector_P), dtype=self.network.dtype, device=self.network.device
        )
        for grads in self._gradients():
            pairs = [
                (grad, tangent)
                for grad, tangent in zip(grads, tangents, strict=True)
                if grad.requires_grad
            ]
            if not pairs:  # a loss that is linear in the parameters
                continue
            with naming_operations():
                found = torch.autograd.grad(
                    [grad for grad, _ in pairs],
                    parameters,
                    [tangent for _, tangent in pairs],
                    retain_graph=self._keep,
                    allow_unused=True,
                    materialize_grads=True,
                )
            total_P += torch.cat([each.flatten().to(total_P) for each in found])
        shards = self._measured.examples.shards
        return (total_P if shards.alone else shards.reduce(total_P)).double()

    def _gradients(self) -> Iterator[list[Tensor]]:
        """Yield the gradients of the parts of the loss, with their graphs."""
        if self._graphs:
            yield from self._graphs
            return
        examples = self._measured.examples
        for start in range(0, examples.num_rows, self._rows):
            rows = slice(start, min(examples.num_rows, start + self._rows))
            loss = self._part(rows)
            if not loss.requires_grad:  # the rows' way meets no parameter
                continue
            with naming_operations():
                grads = torch.autograd.grad(
                    loss,
                    self._parameters,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            check_differentiable(grads)
            if self._keep:
                self._graphs.append([*grads])
            yield [*grads]

    def custom_functions(self) -> list[str]:
        """Return the names of functions in the graph that are not torch's own."""
        grads = [grad for part in self._gradients() for grad in part]
        return [kind.__name__ for kind in functions_in(grads)]

    def by_differences(self, vector_P: Tensor) -> Tensor:
        """Return the product with a vector by a central difference of gradients."""
        named = self.network.parameters
        length = torch.cat([p.detach().flatten().double() for p in named.values()])
        step = self.network.eps ** (1 / 3) * length.norm() / vector_P.norm()
        sides = []
        for sign in (1, -1):
            parts = (sign * step * vector_P).split([p.numel() for p in named.values()])
            moved = {
                name: (p.detach() + part.view_as(p).to(p)).requires_grad_()
                for (name, p), part in zip(named.items(), parts, strict=True)
            }
            rows = slice(0, self._measured.examples.num_rows)
            grads = torch.autograd.grad(
                self._part(rows, moved),
                [*moved.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            sides.append(torch.cat([grad.flatten().double() for grad in grads]))
        return (sides[0] - sides[1]) / (2 * step)

    def _part(
        self, rows: slice, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return what some rows add to the loss."""
        measured, examples = self._measured, self._measured.examples
        part = take_rows(examples.x, rows)
        with torch.enable_grad(), ComposedWeightNorm():
            output = measured.sweep.run(
                lambda: measured.sweep.network(part, parameters)
            )
            return self._loss.weighted_sum(
                examples.layout,
                self._forward.as_given(output),
                part,
                examples.scales[rows].square(),
                examples.slots[rows],
            )


def check_second_derivative(
    model: nn.Module, batch: Any, loss: ProbeLoss, options: HessianOptions
) -> bool:
    """Refuse a loss whose second derivative is missing, or is not all there.

    The backward of a function of somebody's own can leave the graph without an error.
    Networks with such functions are compared with differences of their gradients.

    Args:
        model: The module.
        batch: A few examples.
        loss: Of these examples.
        options: How they are measured.

    Returns:
        Whether the examples depend on each other.

    Raises:
        ValueError: Names the operation that has none.
    """
    with hessian_products(model, batch, loss, options) as products:
        noise = torch.Generator().manual_seed(0)
        size = products.network.num_parameters
        drawn_P = torch.randn(size, generator=noise, dtype=torch.float64)
        vector_P = drawn_P.to(products.network.device)
        image_P = products(vector_P[:, None])[:, 0]
        if names := products.custom_functions():
            near_P = products.by_differences(vector_P)
            if float((near_P - image_P).norm()) > _APART * float(near_P.norm()):
                raise ValueError(
                    f"the loss has no second derivative: the backward of"
                    f" {', '.join(names)} leaves the graph of autograd"
                )
        return products.coupled

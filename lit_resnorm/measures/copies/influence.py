"""Twins without training: what leaving an example out does to first order.

Dimensions: K examples left out, B examples of the batch, P parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_resnorm.measures.copies.copies import Copies, ModelFunction
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.batches import num_rows, occupied, take_rows
from lit_resnorm.measures.passes.untouched import Passes, Reduce, identity, untouched
from lit_resnorm.measures.spectra import Matvec


def influence_copies(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Tensor],
    losses: Callable[[Tensor, Any], Tensor],
    trained: Iterable[str],
    batch: Any,
    examples: Any,
    seen: list[int],
    num: int,
    *,
    num_train: int,
    reduction: Callable[[Any], Reduction] | None = None,
    decay: float = 0.0,
    damping: float = 0.0,
    norm_mode: str = "frozen",
    reduce: Reduce = identity,
    tol: float = 1e-4,
    max_products: int = 100,
) -> Copies:
    r"""Return copies of a model, moved to where training without an example would end.

    .. math:: \theta^i - \theta = \frac{1}{N-1} (G + (w + \lambda) I)^{-1}
              (\nabla l(\theta; z_i) + w \theta)

    is the first step of Newton's method from a minimum of the mean training loss plus
    :math:`w |\theta|^2 / 2` towards that without z_i, with the Gauss-Newton matrix G of
    the batch for the Hessian. An estimate: it knows neither the path of the training
    nor how far it has come, and the batch stands for the training set. Exact for a
    squared loss of a linear model at the minimum, where G is that of the other
    examples and lambda is 0.

    Where the loss is a weighted mean, G is one too, and the weight of N - 1 examples of
    the batch's mean weight over that of z_i stands for N - 1. Where it is a sum,
    nothing takes an example's place: the step is
    :math:`\frac1N ((1 - \frac1N) G + (w + \lambda) I)^{-1} \nabla l(\theta; z_i)`.

    Args:
        model: The model, which is left as it was.
        forward: Takes model and batch, returns outputs of shape `(B, ...)`.
        losses: Takes outputs and batch, returns the loss of each example, `(B,)`.
        trained: Names of the parameters that move.
        batch: This rank's share of the examples that make G.
        examples: The examples left out, the same on every rank.
        seen: Which copy lacks each of them.
        num: Number of copies K; the others stay the model itself.
        num_train: Size N of the training set.
        reduction: Takes a batch, says what makes its training loss of its examples'
            losses; None: their mean does.
        decay: Weight decay w, as coupled to the gradient of the mean; a B-th of it
            where the training loss is the sum of B examples'.
        damping: lambda, in units of the eigenvalues of G.
        norm_mode: `frozen` or `eval`.
        reduce: Sums over ranks.
        tol: Relative residual at which a solution is good enough.
        max_products: Products with G that one solution may take.

    Raises:
        ValueError: If decay plus damping isn't positive: G alone may be singular; if
            no example of the batch counts, or G has no products.
    """
    if decay + damping <= 0:
        raise ValueError(f"damping is {damping}, without decay it must be positive")
    copies = Copies(model, trained, num)
    batch, empty = occupied(batch)
    made_of = (reduction or _plain_mean)(batch)
    weights_B = made_of.weights.to(copies.finite.device) * (not empty)
    counts = torch.stack(
        [weights_B.new_tensor(0.0 if empty else len(weights_B)), weights_B.sum()]
    )
    num_examples, weight = reduce(counts).tolist()
    if not weight > 0:
        raise ValueError("no example of the probe batch counts in the loss")
    mean_weight = weight / num_examples
    with _derivatives(copies, forward, norm_mode, reduce) as derivatives:
        product = gauss_newton(
            derivatives.of_outputs(batch, empty=empty),
            lambda out: losses(out, batch),
            weights_B,
            weight,
            reduce,
        )
        share = 1 - 1 / num_train if made_of.summed else 1
        for place, k in enumerate(seen):
            row = take_rows(examples, slice(place, place + 1))
            own = (reduction or _plain_mean)(row)
            if not float(own.weights) > 0:
                _move(copies, k, torch.zeros_like(derivatives.weights()))
                continue
            slope_P = derivatives.slope(lambda out, row=row: losses(out, row), row)
            if not made_of.summed:
                slope_P = slope_P + decay * derivatives.weights()
            step_P = conjugate_gradients(
                lambda v_P: share * product(v_P) + (decay + damping) * v_P,
                _mean_over_ranks(slope_P, reduce),
                tol=tol,
                max_products=max_products,
            )
            _move(copies, k, step_P / _others(num_train, mean_weight, own))
    return copies


def check_influence(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Tensor],
    losses: Callable[[Tensor, Any], Tensor],
    trained: Iterable[str],
    batch: Any,
    *,
    norm_mode: str = "frozen",
) -> None:
    """See that the Gauss-Newton matrix has products.

    Args:
        model: The model, which is left as it was.
        forward: Takes model and batch, returns outputs.
        losses: Takes outputs and batch, returns the loss of each example.
        trained: Names of the parameters that move.
        batch: A few examples.
        norm_mode: `frozen` or `eval`.

    Raises:
        ValueError: If an operation, or the loss, can't be differentiated as that
            needs; it is named.
    """
    copies = Copies(model, trained, 0)
    weights = _plain_mean(batch).weights
    with _derivatives(copies, forward, norm_mode, identity) as derivatives:
        gauss_newton(
            derivatives.of_outputs(batch),
            lambda out: losses(out, batch),
            weights,
            float(weights.sum()),
        )(derivatives.weights())


def _plain_mean(batch: Any) -> Reduction:
    return Reduction(torch.ones(num_rows(batch), dtype=torch.float64))


def _others(num_train: int, mean_weight: float, own: Reduction) -> float:
    """Return by what a step is divided: the others' weight over the example's own."""
    if own.summed:
        return num_train
    return max(num_train - 1, 1) * mean_weight / float(own.weights)


@dataclass(frozen=True)
class _Derivatives:
    """Derivatives in the trained parameters of a model, at its own weights.

    Attributes:
        bound: The model's outputs at any weights.
        run: Runner of forward passes.
        names: The parameters.
        leaves: Copies of them.
    """

    bound: ModelFunction
    run: Passes
    names: list[str]
    leaves: list[Tensor]

    def output(self, batch: Any, *, empty: bool = False) -> Tensor:
        """Return the outputs, with their graph."""
        weights = dict(zip(self.names, self.leaves, strict=True))
        return self.run(lambda: self.bound.with_weights(weights, batch), empty=empty)

    def weights(self) -> Tensor:
        """Return the parameters, flat."""
        return _flat_or_zero(self.leaves, self.leaves)

    def slope(self, loss: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
        """Return the gradient of the summed loss of a batch, flat."""
        total = loss(self.output(batch)).sum()
        grads = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return _flat_or_zero(grads, self.leaves)

    def of_outputs(self, batch: Any, *, empty: bool = False) -> OutputDerivatives:
        """Return the products with the outputs' Jacobian."""
        output = self.output(batch, empty=empty)
        return OutputDerivatives(output, self.leaves, lambda t: self._along(batch, t))

    @torch.no_grad()
    def _along(self, batch: Any, tangents: list[Tensor]) -> Tensor:
        with warnings.catch_warnings(), forward_ad.dual_level():
            # Some of torch's own rules are scripted, which it has deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            duals = map(forward_ad.make_dual, self.leaves, tangents)
            weights = dict(zip(self.names, duals, strict=True))
            found = self.run(lambda: self.bound.with_weights(weights, batch))
            tangent = forward_ad.unpack_dual(found).tangent
            return torch.zeros_like(found) if tangent is None else tangent


@contextmanager
def _derivatives(
    copies: Copies,
    forward: Callable[[nn.Module, Any], Tensor],
    norm_mode: str,
    reduce: Reduce,
) -> Iterator[_Derivatives]:
    model, originals = copies.model, copies.originals
    # The fused attention kernels can be differentiated once only.
    with (
        sdpa_kernel(SDPBackend.MATH),
        untouched(model, norm_mode=norm_mode, reduce=reduce) as run,
    ):
        leaves = [p.detach().clone().requires_grad_() for p in originals.values()]
        yield _Derivatives(ModelFunction(model, forward), run, [*originals], leaves)


class OutputDerivatives:
    """Products with the Jacobian J of outputs in parameters, from one kept graph.

    Args:
        output: Outputs, with their graph.
        leaves: The parameters, P numbers in all.
        forward_mode: Takes tangents of the parameters, returns J v, where an operation
            (hardsigmoid) can't be differentiated twice.
    """

    def __init__(
        self,
        output: Tensor,
        leaves: list[Tensor],
        forward_mode: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> None:
        self.output, self._leaves = output, leaves
        self._dual = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, leaves, self._dual, create_graph=True, allow_unused=True
        )
        self._used = [
            (place, g)
            for place, g in enumerate(pulled)
            if g is not None and g.requires_grad
        ]
        self._ways = [self._reverse_twice, *([forward_mode] if forward_mode else [])]
        self._proven = False

    def back(self, u: Tensor) -> Tensor:
        """Return J^T u, flat."""
        back = torch.autograd.grad(
            self.output, self._leaves, u, retain_graph=True, allow_unused=True
        )
        return _flat_or_zero(back, self._leaves)

    def forth(self, v_P: Tensor) -> Tensor:
        """Return J v.

        Raises:
            ValueError: If no way to it is right.
        """
        while not self._proven:
            if why_not := self._fault():
                del self._ways[0]
                if not self._ways:
                    raise ValueError(
                        "method 'influence' needs operations that can be differentiated"
                        f" twice, or in forward mode: {why_not}{self._own_functions()}"
                    )
            else:
                self._proven = True
        return self._ways[0](_split(v_P, self._leaves))

    def _fault(self) -> str:
        r"""Return what is wrong with the first way; nothing where it is right.

        :math:`u^\top J J^\top u = |J^\top u|^2`, up to rounding, which grows on its
        way through a network. A backward function that leaves the graph takes part of
        it away, without an error.
        """
        noise = torch.Generator().manual_seed(0)
        u = torch.randn(self.output.shape, generator=noise, dtype=torch.float64)
        u = u.to(self.output)
        v_P = self.back(u)
        try:
            found = (u * self._ways[0](_split(v_P, self._leaves))).sum()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # nothing but trying tells
            return str(error).partition("\n")[0]
        square = v_P @ v_P
        bound = torch.finfo(square.dtype).eps ** 0.25 * square
        missed = bool((found - square).abs() > bound)
        return "a backward function leaves the graph" if missed else ""

    def _own_functions(self) -> str:
        """Return the names of functions of the project's own among the operations."""
        seen, names = set(), set()
        nodes = [self.output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                names.add(type(node).__name__.removesuffix("Backward"))
            nodes += [after for after, _ in node.next_functions]
        return f" ({', '.join(sorted(names))})" if names else ""

    def _reverse_twice(self, tangents: list[Tensor]) -> Tensor:
        """Return J v as the derivative of the linear map u -> J^T u."""
        return torch.autograd.grad(
            [g for _, g in self._used],
            self._dual,
            [tangents[place] for place, _ in self._used],
            retain_graph=True,
        )[0]


def gauss_newton(
    derivatives: OutputDerivatives,
    losses: Callable[[Tensor], Tensor],
    weights_B: Tensor,
    total: float,
    reduce: Reduce = identity,
) -> Matvec:
    r"""Return the product with the Gauss-Newton matrix of a weighted mean of losses.

    .. math:: G = \frac{1}{\sum_n w_n} \sum_n w_n J_n^T \nabla_f^2 l_n J_n

    Args:
        derivatives: Products with the outputs' Jacobian.
        losses: Takes outputs, returns the loss of each example.
        weights_B: Weights of this rank's examples; 0 for a dummy row.
        total: Their sum over all ranks.
        reduce: Sums over ranks.

    Raises:
        ValueError: If the loss can't be differentiated twice.
    """
    heads = derivatives.output.detach().requires_grad_()
    each = losses(heads)
    slope = torch.autograd.grad(
        (each * weights_B.to(each)).sum(), heads, create_graph=True
    )[0]

    def product(v_P: Tensor) -> Tensor:
        along_v = derivatives.forth(v_P)
        try:
            curved = torch.autograd.grad(slope, heads, along_v, retain_graph=True)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "method 'influence' needs a loss that can be differentiated twice:"
                f" {str(error).partition(chr(10))[0]}"
            ) from error
        return reduce(derivatives.back(curved)) / total

    return product


def conjugate_gradients(
    matvec: Matvec, b_P: Tensor, *, tol: float, max_products: int
) -> Tensor:
    """Return an approximate solution of `A x = b`, A symmetric positive definite.

    Args:
        matvec: The product with A.
        b_P: The right-hand side.
        tol: Ends at a residual of `tol` times the norm of b.
        max_products: Ends after so many products in any case.
    """
    x_P = torch.zeros_like(b_P)
    r_P, direction_P = b_P.clone(), b_P.clone()
    square = r_P @ r_P
    goal = square * tol**2
    for _ in range(max_products):
        if not square > goal:
            break
        image_P = matvec(direction_P)
        length = square / (direction_P @ image_P)
        x_P += length * direction_P
        r_P -= length * image_P
        square, last = r_P @ r_P, square
        direction_P = r_P + (square / last) * direction_P
    return x_P


def _mean_over_ranks(vector_P: Tensor, reduce: Reduce) -> Tensor:
    """Return the mean over ranks, so that all of them iterate equally often.

    Ranks hold the same weights, but for rows of an embedding with `max_norm`.
    """
    if reduce is identity:
        return vector_P
    return reduce(vector_P) / reduce(vector_P.new_ones(1))


def _flat_or_zero(tensors: Iterable[Tensor | None], like: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t).detach().flatten()
            for t, p in zip(tensors, like, strict=True)
        ]
    )


def _split(v_P: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = v_P.split([p.numel() for p in like])
    return [part.view_as(p) for part, p in zip(parts, like, strict=True)]


@torch.no_grad()
def _move(copies: Copies, member: int, step_P: Tensor) -> None:
    originals = copies.originals
    steps = _split(step_P, [*originals.values()])
    for (name, value), step in zip(originals.items(), steps, strict=True):
        copies.params[name][member] = value + step
    for name, value in copies.model.named_buffers():
        copies.buffers[name][member] = value
    copies.forked.add(member)

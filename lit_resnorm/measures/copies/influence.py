"""Twins without training: what leaving an example out does to first order.

Dimensions: K examples left out, B examples of the batch, P parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_resnorm.measures.copies.copies import Copies, ModelFunction
from lit_resnorm.measures.passes.batches import num_rows, occupied, take_rows
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched
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
        decay: Weight decay w, as coupled to the gradient.
        damping: lambda, in units of the eigenvalues of G.
        norm_mode: `frozen` or `eval`.
        reduce: Sums over ranks.
        tol: Relative residual at which a solution is good enough.
        max_products: Products with G that one solution may take.

    Raises:
        ValueError: If decay plus damping isn't positive: G alone may be singular.
    """
    if decay + damping <= 0:
        raise ValueError(f"damping is {damping}, without decay it must be positive")
    copies = Copies(model, trained, num)
    names = list(copies.originals)
    batch, empty = occupied(batch)
    # The fused attention kernels can be differentiated once only.
    with (
        sdpa_kernel(SDPBackend.MATH),
        untouched(model, norm_mode=norm_mode, reduce=reduce) as run,
    ):
        leaves = [
            p.detach().clone().requires_grad_() for p in copies.originals.values()
        ]
        bound = ModelFunction(model, forward)

        def output(of: Any) -> Tensor:
            weights = dict(zip(names, leaves, strict=True))
            return run(lambda: bound.with_weights(weights, of), empty=empty)

        @torch.no_grad()
        def along(tangents: list[Tensor]) -> Tensor:
            with warnings.catch_warnings(), forward_ad.dual_level():
                # Some of torch's own rules are scripted, which it has deprecated.
                warnings.filterwarnings("ignore", message=".*torch.jit.script")
                duals = map(forward_ad.make_dual, leaves, tangents)
                weights = dict(zip(names, duals, strict=True))
                found = run(lambda: bound.with_weights(weights, batch))
                tangent = forward_ad.unpack_dual(found).tangent
                return torch.zeros_like(found) if tangent is None else tangent

        batch_output = output(batch)
        product = gauss_newton(
            batch_output,
            lambda out: losses(out, batch),
            leaves,
            0 if empty else num_rows(batch),
            reduce,
            along,
        )
        empty = False
        for place, k in enumerate(seen):
            row = take_rows(examples, slice(place, place + 1))
            loss = losses(output(row), row).sum()
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            step_P = conjugate_gradients(
                lambda v_P: product(v_P) + (decay + damping) * v_P,
                _mean_over_ranks(
                    _flat_or_zero(grads, leaves)
                    + decay * _flat_or_zero(leaves, leaves),
                    reduce,
                ),
                tol=tol,
                max_products=max_products,
            )
            _move(copies, k, step_P / max(num_train - 1, 1))
    return copies


def gauss_newton(
    output: Tensor,
    losses: Callable[[Tensor], Tensor],
    leaves: list[Tensor],
    count: int,
    reduce: Reduce = identity,
    forward_mode: Callable[[list[Tensor]], Tensor] | None = None,
) -> Matvec:
    r"""Return the product with the Gauss-Newton matrix of a mean loss.

    .. math:: G = \frac1N \sum_n J_n^T \nabla_f^2 l_n J_n

    from one kept graph of the outputs: J v as the derivative of the linear map
    u -> J^T u, then the loss's Hessian, then J^T.

    Args:
        output: Outputs, with their graph.
        losses: Takes outputs, returns the loss of each example.
        leaves: The parameters, P numbers in all.
        count: How many of this rank's rows count: all, or 0 for a dummy row.
        reduce: Sums over ranks.
        forward_mode: Takes tangents of the parameters, returns J v, where an operation
            (hardsigmoid) can't be differentiated twice.
    """
    total = float(reduce(output.new_tensor([count], dtype=torch.float64)))
    dual = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(
        output, leaves, dual, create_graph=True, allow_unused=True
    )
    used = [(p, g) for p, g in zip(leaves, pulled, strict=True) if g is not None]
    heads = output.detach().requires_grad_()
    slope = torch.autograd.grad(losses(heads).sum(), heads, create_graph=True)[0]

    twice = True

    def along(v_P: Tensor) -> Tensor:
        nonlocal twice
        tangents = _split(v_P, leaves)
        parts = dict(zip(map(id, leaves), tangents, strict=True))
        if twice or forward_mode is None:
            try:
                return torch.autograd.grad(
                    [g for _, g in used],
                    dual,
                    [parts[id(p)] for p, _ in used],
                    retain_graph=True,
                )[0]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # nothing but trying tells
                if forward_mode is None:
                    raise
                twice = False
        return forward_mode(tangents)

    def product(v_P: Tensor) -> Tensor:
        along_v = along(v_P)
        curved = torch.autograd.grad(slope, heads, along_v, retain_graph=True)[0]
        back = torch.autograd.grad(
            output, leaves, curved, retain_graph=True, allow_unused=True
        )
        return reduce(_flat_or_zero(back, leaves) * bool(count)) / total

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

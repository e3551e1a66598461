"""Whether what a recorded pass found holds: checked against autograd on few rows.

Functions that torch's function modes do not see (custom autograd functions, scripted
functions, views of parameters made beforehand) can take parameters in, and rows can
depend on each other in ways that no call shows. Both show in gradients.

Shapes: S seeds, P parameters of a use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.examinations import Examined, settings
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.fisher.parameter_uses import (
    EmbeddingUse,
    OuterUse,
    ScaleUse,
    Use,
    outer_rows,
)
from lit_resnorm.measures.fisher.recording import UseRecorder, recorded_pass
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.passes.batches import leaves, num_rows, take_rows
from lit_resnorm.measures.passes.random_states import RandomStates
from lit_resnorm.measures.passes.untouched import Passes

_TOGETHER = 4
"""Rows that run together, to see whether they depend on each other."""

_DOUBLE = torch.finfo(torch.float64).eps


def examine(
    network: Network,
    run: Passes,
    x: Any,
    recorder: UseRecorder,
    output: Tensor,
    shards: Shards,
) -> Examined:
    """Return what gradients say, the same on every rank.

    Args:
        network: What is measured.
        run: Runner of forward passes.
        x: This rank's rows.
        recorder: What a pass on the first of them found.
        output: That pass's output.
        shards: Rows of all ranks.
    """
    seed = _random_gradient(output)
    parameters = list(network.parameters.values())
    with _single_precision():
        direct = _gradients(output, parameters, seed)
        found = _unexplained(network, recorder, output, seed, direct)
        among = _Among(True, False)
        if num_rows(x) > 1 and run.norm_mode != "train":
            row = _RecordedRow(network, recorder, output, seed, direct)
            among = _among_others(row, run, x)
    # Parameters in the order of the network: all ranks have the same.
    sizes = torch.stack([grad.norm().double() for grad in direct])
    dead = not bool(((sizes > 0) & sizes.isfinite()).all())
    flags = seed.new_tensor(
        [*found, not among.separable, among.coupled, dead], dtype=torch.float64
    )
    if not shards.alone:
        flags = shards.reduce(flags)
    *unexplained, mixed, coupled, dead = flags.bool().tolist()
    names = zip(network.parameters, unexplained, strict=True)
    return Examined(
        frozenset(n for n, flag in names if flag), not mixed, coupled, not dead
    )


def structure_of(
    network: Network, run: Passes, x: Any, recorder: UseRecorder, output: Tensor
) -> Hashable:
    """Return all that `examine` depends on, beside the values of weights and rows."""
    own = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    return (
        run.norm_mode,
        settings(network.model),
        tuple((n, p.shape, p.dtype) for n, p in network.parameters.items()),
        tuple((type(u), u.names, u.shape, u.separable) for u in recorder.uses),
        frozenset(recorder.general),
        output.shape,
        min(num_rows(x), _TOGETHER),
        tuple((leaf.shape[1:], leaf.dtype) for leaf in own),
    )


def _unexplained(
    network: Network,
    recorder: UseRecorder,
    output: Tensor,
    seed: Tensor,
    direct: Sequence[Tensor],
) -> list[bool]:
    """Return for each parameter whether its uses give another gradient than autograd's.

    Only sums are taken in another order, of terms whose size is known.
    """
    by_uses = {n: torch.zeros_like(p).flatten() for n, p in network.parameters.items()}
    sizes = {n: torch.zeros_like(p).flatten() for n, p in network.parameters.items()}
    grads = _use_gradients(recorder, output, seed)
    for use, grad in zip(recorder.uses, grads, strict=True):
        for name, part in zip(use.names, _gradients_of_use(use, grad), strict=True):
            by_uses[name] += part
        for name, part in zip(
            use.names, _gradients_of_use(*_sized(use, grad)), strict=True
        ):
            sizes[name] += part
    return [
        name not in recorder.general
        and _beyond_rounding(
            grad.flatten(),
            by_uses[name],
            sizes[name],
            torch.finfo(grad.dtype).eps ** 0.5,
        )
        for name, grad in zip(network.parameters, direct, strict=True)
    ]


@dataclass(frozen=True)
class _RecordedRow:
    """A recorded pass of a network on one row.

    Attributes:
        network: Which network.
        recorder: What the pass found.
        output: Its output.
        seed: What the output is multiplied by for gradients.
        direct: Gradients of the parameters.
    """

    network: Network
    recorder: UseRecorder
    output: Tensor
    seed: Tensor
    direct: Sequence[Tensor]


@dataclass(frozen=True)
class _Among:
    """What a row shows among others.

    Attributes:
        separable: Whether rows can be told apart in uses.
        coupled: Whether they depend on each other.
    """

    separable: bool
    coupled: bool


def _among_others(row: _RecordedRow, run: Passes, x: Any) -> _Among:
    """Return what the first row shows among others.

    Rounding differs between one row and several, and a deep network multiplies it, by a
    hundred thousand in fifty layers of batch norm: what is not alike to half of the
    digits of single precision is judged in double precision, by a quarter of those.
    """
    if row.network.eps <= _DOUBLE:
        return _as_second_of_several(row, run, x, row.network.eps**0.25)
    among = _as_second_of_several(row, run, x, row.network.eps**0.5)
    if among.separable and not among.coupled:
        return among
    try:
        return _as_second_of_several(
            _in_double_precision(row, run, x), run, x, _DOUBLE**0.25
        )
    except Exception:
        # Not every network runs in double precision, and each says so in its own way:
        # then only a quarter of the digits must agree.
        return _as_second_of_several(row, run, x, row.network.eps**0.25)


def _in_double_precision(row: _RecordedRow, run: Passes, x: Any) -> _RecordedRow:
    network = row.network.in_double_precision()
    recorder, output = recorded_pass(network, run, take_rows(x, slice(0, 1)))
    seed = row.seed.double()
    direct = _gradients(output, list(network.parameters.values()), seed)
    return _RecordedRow(network, recorder, output, seed, direct)


def _as_second_of_several(
    row: _RecordedRow, run: Passes, x: Any, bound: float
) -> _Among:
    """Return what the row shows as the second of several, up to a relative bound.

    It may depend on rows before it or after it, and reversed it would be in another
    place.
    """
    network, output = row.network, row.output
    num = min(num_rows(x), _TOGETHER)
    several = take_rows(x, torch.tensor([1, 0, *range(2, _TOGETHER)][:num]))
    states = RandomStates.now()
    recorder, outputs = recorded_pass(network, run, several)
    if states.moved():
        return _Among(True, False)  # a network that draws is no function of its rows
    if outputs.shape != (num * len(output), *output.shape[1:]):
        return _Among(False, True)
    own = slice(len(output), 2 * len(output))
    seeds = torch.zeros_like(outputs)
    seeds[own] = row.seed
    grads = _gradients(outputs, list(network.parameters.values()), seeds)
    coupled = _beyond_rounding(outputs[own], output, output, bound)
    coupled |= _beyond_rounding(
        _flattened(grads), _flattened(row.direct), _flattened(row.direct), bound
    )
    uses = recorder.uses
    if [use.names for use in uses] != [use.names for use in row.recorder.uses]:
        return _Among(False, coupled)
    if any(not use.separable or use.shape[0] != num for use in uses):
        return _Among(False, coupled)
    # The first row's gradients, while the others have some too.
    alone = _use_gradients(row.recorder, output, row.seed)
    together = _use_gradients(recorder, outputs, torch.cat([row.seed] * num))
    for place, use in enumerate(row.recorder.uses):
        expected = use.rows(alone[place], 1)[0]
        found = _second_row(uses[place], together[place], num)
        sized, grad = _sized(use, alone[place])
        if _beyond_rounding(found, expected, sized.rows(grad, 1)[0], bound):
            return _Among(False, coupled)
    return _Among(True, coupled)


def _second_row(use: Use, grad: Tensor, num_rows: int) -> Tensor:
    """Return what `use.rows` does for one row, without the others' outer products."""
    if not isinstance(use, OuterUse):
        return use.rows(grad, num_rows)[1]
    left, right = use.left(use.input, num_rows), use.right(grad, num_rows)
    return outer_rows(left[1:2], right[1:2], use.num_inputs)[0]


def _gradients_of_use(use: Use, grad: Tensor) -> Sequence[Tensor]:
    """Return the gradient of each of a use's parameters, over all rows, flat."""
    row_P = use.rows(grad, 1)[0, 0]
    if not isinstance(use, OuterUse):
        return row_P.chunk(len(use.names))
    row_OI = row_P.view(use.num_outputs, use.num_inputs)
    if isinstance(use, EmbeddingUse):
        return [row_OI.T.flatten()]
    if not use.has_bias:
        return [row_P]
    return row_OI[:, :-1].flatten(), row_OI[:, -1]


def _sized(use: Use, grad: Tensor) -> tuple[Use, Tensor]:
    """Return a use and a gradient that give the sums of absolute values."""
    if isinstance(use, ScaleUse) and use.factor is not None:
        use = replace(use, factor=use.factor.abs())
    elif isinstance(use, OuterUse) and not isinstance(use, EmbeddingUse):
        use = replace(use, input=use.input.abs())
    return use, grad.abs()


def _beyond_rounding(
    found: Tensor, expected: Tensor, sizes: Tensor, bound: float
) -> bool:
    # NaN is apart from nothing: it is measured as it is.
    apart = (found.detach() - expected.detach()).norm()
    return bool(apart > bound * sizes.detach().norm())


def _random_gradient(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return drawn.to(output)


def _flattened(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def _gradients(
    output: Tensor, parameters: Sequence[Tensor], seed: Tensor
) -> Sequence[Tensor]:
    if not output.requires_grad:  # the row's way meets no parameter
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad(
        output,
        parameters,
        seed,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _use_gradients(
    recorder: UseRecorder, output: Tensor, seed: Tensor
) -> Sequence[Tensor]:
    """Return the gradient of each use's output, shape `(1, *shape)`."""
    edges: list[Any] = list(recorder.edges)
    if not edges:
        return []
    grads = torch.autograd.grad(
        output, edges, seed, retain_graph=True, allow_unused=True
    )
    return [
        (seed.new_zeros(use.shape) if grad is None else grad)[None]
        for use, grad in zip(recorder.uses, grads, strict=True)
    ]


@contextmanager
def _single_precision() -> Iterator[None]:
    # cuDNN's convolutions of float32 have three digits unless told otherwise.
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed

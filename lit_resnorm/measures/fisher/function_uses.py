"""How each torch function uses parameters.

A handler has the parameters of its function, by name and order, as far as it knows
them: a call that is spelled otherwise does not fit it. It makes the call and returns
the output with the use, or None, without having made the call, where the parameters
enter in no way that has a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.measures.fisher.parameter_uses import (
    ConvolutionUse,
    EmbeddingUse,
    LinearUse,
    ScaleUse,
    Use,
    conv_padding,
)

Function = Callable[..., Any]
Names = Callable[[Any], tuple[str, ...]]
"""Gives a tensor's name as a trainable parameter, or nothing."""

RecordedUse = tuple[Tensor, Use] | None


def _linear_use(
    name_of: Names,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> RecordedUse:
    name, bias_name = name_of(weight), name_of(bias)
    plain = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    if not plain or not (name or bias_name):
        return None
    output = func(input, weight, bias)
    if not name:
        return output, _bias(output, bias_name, output.ndim - 1)
    use = LinearUse(
        (*name, *bias_name),
        output.shape,
        input=input.detach(),
        has_bias=bool(bias_name),
        num_outputs=weight.shape[0],
        num_inputs=weight.shape[1] + len(bias_name),
    )
    return output, use


def _convolution(
    name_of: Names,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> RecordedUse:
    name, bias_name = name_of(weight), name_of(bias)
    if input.ndim != weight.ndim or (name and groups != 1) or not (name or bias_name):
        return None
    output = func(input, weight, bias, stride, padding, dilation, groups)
    if not name:
        return output, _bias(output, bias_name, 1)
    kernel = tuple(weight.shape[2:])
    steps = _each(dilation, len(kernel))
    use = ConvolutionUse(
        (*name, *bias_name),
        output.shape,
        input=input.detach(),
        has_bias=bool(bias_name),
        num_outputs=weight.shape[0],
        num_inputs=weight[0].numel() + len(bias_name),
        kernel=kernel,
        stride=_each(stride, len(kernel)),
        padding=conv_padding(padding, kernel, steps),
        dilation=steps,
    )
    return output, use


def _embedding(
    name_of: Names,
    func: Function,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> RecordedUse:
    if max_norm is not None or scale_grad_by_freq or sparse or not name_of(weight):
        return None
    output = func(input, weight, padding_idx, max_norm, norm_type)
    index = input.detach()
    if padding_idx is not None:  # its row gets no gradient
        index = index.masked_fill(index == padding_idx % weight.shape[0], -1)
    use = EmbeddingUse(
        name_of(weight),
        output.shape,
        input=index,
        has_bias=False,
        num_outputs=weight.shape[1],
        num_inputs=weight.shape[0],
    )
    return output, use


def _statistic_norm(
    name_of: Names,
    func: Function,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> RecordedUse:
    def normed() -> Tensor:
        return func(input, running_mean, running_var, None, None, *args, **kwargs)

    return _affine(name_of, normed, weight, bias, dim=1)


def _group_norm(
    name_of: Names,
    func: Function,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> RecordedUse:
    def normed() -> Tensor:
        return func(input, num_groups, None, None, eps)

    return _affine(name_of, normed, weight, bias, dim=1)


def _layer_norm(
    name_of: Names,
    func: Function,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> RecordedUse:
    def normed() -> Tensor:
        return func(input, normalized_shape, None, None, eps)

    return _affine(name_of, normed, weight, bias)


def _rms_norm(
    name_of: Names,
    func: Function,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> RecordedUse:
    def normed() -> Tensor:
        return func(input, normalized_shape, None, eps)

    return _affine(name_of, normed, weight, None)


def _multiply(name_of: Names, func: Function, input: Any, other: Any) -> RecordedUse:
    return _broadcast(name_of, func, input, other, product=True)


def _addition(name_of: Names, func: Function, input: Any, other: Any) -> RecordedUse:
    return _broadcast(name_of, func, input, other, product=False)


def _broadcast(
    name_of: Names, func: Function, input: Any, other: Any, *, product: bool
) -> RecordedUse:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    parameters = [operand for operand in (input, other) if name_of(operand)]
    if len(parameters) != 1 or input.is_complex() or other.is_complex():
        return None
    factor = other if parameters[0] is input else input
    output = func(input, other)
    use = ScaleUse(
        name_of(parameters[0]),
        output.shape,
        factor=factor.detach() if product else None,
        view=(1,) * (output.ndim - parameters[0].ndim) + tuple(parameters[0].shape),
    )
    return output, use


def _affine(
    name_of: Names,
    normalise: Callable[[], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int | None = None,
) -> RecordedUse:
    """Return the scaled and shifted values, and that use; None where none is trained.

    Args:
        name_of: Names of trainable parameters.
        normalise: Gives the normalised values.
        weight: Scales.
        bias: Summands.
        dim: Dimension along which they vary; None: the last ones.
    """
    name, bias_name = name_of(weight), name_of(bias)
    if not name and not bias_name:
        return None
    normed = normalise()
    if dim is not None:
        view = _along(normed.shape, dim)
    else:
        sizes = [p.shape for p in (weight, bias) if p is not None]
        view = (1,) * (normed.ndim - len(sizes[0])) + tuple(sizes[0])
    output = normed
    if weight is not None and bias is not None:
        output = torch.addcmul(bias.view(view), normed, weight.view(view))
    elif weight is not None:
        output = normed * weight.view(view)
    elif bias is not None:
        output = normed + bias.view(view)
    use = ScaleUse(
        (*name, *bias_name),
        output.shape,
        factor=normed.detach() if name else None,
        view=view,
    )
    return output, use


def _bias(output: Tensor, names: tuple[str, ...], dim: int) -> ScaleUse:
    return ScaleUse(names, output.shape, None, _along(output.shape, dim))


def _along(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(size if d == dim else 1 for d, size in enumerate(shape))


def _each(value: Any, num: int) -> tuple[int, ...]:
    return (
        (value,) * num if isinstance(value, int) else tuple(value) * (num // len(value))
    )


HANDLERS: dict[Function, Callable[..., RecordedUse]] = {
    F.linear: _linear_use,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.embedding: _embedding,
    F.batch_norm: _statistic_norm,
    F.instance_norm: _statistic_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    torch.add: _addition,
    Tensor.add: _addition,
}
"""By the function itself: those of torch and of its functional module differ in the
order of their parameters where they share a name."""

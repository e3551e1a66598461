"""The two ends of a net: what comes before its blocks and what after."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import nn

from lit_resnorm.nets.initialization import Draws
from lit_resnorm.nets.layers import (
    ACTIVATIONS,
    Layer,
    Style,
    draw_weights,
    fan_in,
    normalization,
    positive,
    weight_layer,
)

__all__ = ["checked_kernel", "make_head", "make_stem"]


def checked_kernel(in_shape: Sequence[int], kernel_size: int | None) -> int:
    """Return the kernel size, 0 for fully connected nets.

    Raises:
        ValueError: If it is even or not positive, or inputs have no channels.
    """
    if kernel_size is None:
        return 0
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    if len(in_shape) != 3:
        raise ValueError(
            "convolutions need in_shape (channels, height, width); "
            f"got {tuple(in_shape)}"
        )
    return kernel_size


def make_stem(
    in_shape: Sequence[int],
    width: int,
    kernel: int,
    stride: int,
    draws: Draws,
    boundary: str,
    *,
    bias: bool = False,
    pool: bool = False,
    project: bool = False,
) -> nn.Module:
    """Return a convolution, or for kernel 0 a flattening and a projection.

    The projection is left out where inputs have `width` features already, unless
    `project`. Weights have
    variance 1/fan_in. With `pool` the convolution is followed by a maximum over 3 x 3
    positions with stride 2.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if kernel:
        spec = Layer(width, kernel, stride, kernel // 2)
        conv = weight_layer(in_shape[0], spec, boundary=boundary, bias=bias)
        draw_weights(conv, draws, "stem.conv", fan_in(conv) ** -0.5)
        parts["conv"] = conv
        if pool:
            parts["pool"] = nn.MaxPool2d(3, 2, 1)
        return nn.Sequential(parts)
    features = prod(in_shape)
    if features == width and not project:
        return nn.Flatten()
    projection = weight_layer(features, Layer(width), bias=bias)
    draw_weights(projection, draws, "stem.projection", features**-0.5)
    parts["flatten"], parts["projection"] = nn.Flatten(), projection
    return nn.Sequential(parts)


def make_head(
    width: int,
    num_outputs: int,
    style: Style,
    draws: Draws,
    *,
    spatial: bool,
    bias: bool,
    pattern: str = "",
) -> nn.Sequential:
    """Return the read-out, after what `pattern` names and a mean over positions.

    Args:
        width: Units or channels of its input.
        num_outputs: Number of outputs.
        style: The switches; Fixup's read-out starts at 0, others have variance 1/width.
        draws: Random numbers.
        spatial: Whether inputs have positions.
        bias: Whether the read-out has a bias.
        pattern: `na`, `a` or nothing, see `Block`.

    Raises:
        ValueError: If `num_outputs` is below 1.
    """
    positive("num_classes", num_outputs)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if "n" in pattern and style.norm != "none":
        norm_style = replace(style, gamma_init=1.0)
        parts["norm"] = normalization(norm_style, width, spatial=spatial)
    if "a" in pattern:
        parts["act"] = ACTIVATIONS[style.activation]()
    if spatial:
        parts["pool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
    readout = weight_layer(width, Layer(num_outputs), bias=bias)
    std = 0.0 if style.scale == "fixup" else width**-0.5
    draw_weights(readout, draws, "head.fc", std)
    parts["fc"] = readout
    return nn.Sequential(parts)

"""The small net of MacDonald et al. with three kinds of skip connection."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import nn

from lit_resnorm.nets.blocks import Block
from lit_resnorm.nets.initialization import Draws
from lit_resnorm.nets.layers import (
    Layer,
    Style,
    choose,
    draw_weights,
    fan_in,
    weight_layer,
)
from lit_resnorm.nets.shortcut import Shortcut
from lit_resnorm.nets.stacked import Net
from lit_resnorm.nets.stem_and_head import checked_kernel, make_head

__all__ = ["tiny_net"]

TINY_SKIPS = ("none", "conv", "pooled")


def tiny_net(
    in_shape: Sequence[int], num_outputs: int, *, skips: str, style: Style
) -> Net:
    """Return the net of two blocks on which the modified shortcut was studied.

    A 5 x 5 convolution to 5 channels and an average over 2 x 2; a block of two 5 x 5
    convolutions; one to 20 channels, of 3 x 3 with stride 2, then 3 x 3 without
    padding; batch norm, ReLU and read-out of all features.

    Source: MacDonald, Valmadre, Saratchandran & Lucey (2022), arXiv 2210.05371, public
    code.

    Args:
        in_shape: Shape of one input, `(C, 28, 28)`: of other sizes shortcut and branch
            of the second block don't match.
        num_outputs: Number of outputs C.
        skips: `none`; `conv`: identity, and a 1 x 1 shortcut of stride 3; `pooled`:
            that and three times the average over 3 x 3.
        style: The switches of `Style`.

    Raises:
        ValueError: On another `skips` or shape.
    """
    choose("skips", skips, TINY_SKIPS)
    checked_kernel(in_shape, 5)
    if tuple(in_shape[1:]) != (28, 28):
        raise ValueError(f"this net needs in_shape (C, 28, 28); got {tuple(in_shape)}")
    draws = Draws()
    conv = weight_layer(in_shape[0], Layer(5, 5), bias=style.bias)
    draw_weights(conv, draws, "stem.conv", fan_in(conv) ** -0.5)
    stem = nn.Sequential(OrderedDict(conv=conv, pool=nn.AvgPool2d(2)))
    residual = skips != "none"
    make = partial(
        Block, pattern="nawnaw", style=style, draws=draws, depth=2, residual=residual
    )
    shortcut = None
    if residual:
        shortcut = Shortcut(
            5, 20, 3, pooled=skips == "pooled", front=7, bias=style.bias
        )
        shortcut.draw(draws, "blocks.1", variance=2.0)
    blocks = [
        make(5, [Layer(5, 5, 1, 2)] * 2, name="blocks.0", index=0),
        make(
            5,
            [Layer(20, 3, 2, 1), Layer(20, 3)],
            name="blocks.1",
            index=1,
            shortcut=shortcut,
            shortcut_of="activation",
        ),
    ]
    head = make_head(
        20 * 4 * 4, num_outputs, style, draws, spatial=False, bias=True, pattern="na"
    )
    head = nn.Sequential(
        OrderedDict([("flatten", nn.Flatten()), *head.named_children()])
    )
    return Net(stem, blocks, head)

"""Convolutional pre-activation networks in stages of growing width."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from torch import nn

from lit_resnorm.nets.blocks import Block, share
from lit_resnorm.nets.initialization import Draws
from lit_resnorm.nets.layers import Layer, Style, choose, positive
from lit_resnorm.nets.shortcut import Shortcut
from lit_resnorm.nets.stacked import Net
from lit_resnorm.nets.stem_and_head import checked_kernel, make_head, make_stem

__all__ = ["staged_net"]

DOWNSAMPLING = ("stride", "average")
EXPANSION = 4


def staged_net(
    in_shape: Sequence[int],
    num_outputs: int,
    *,
    stages: Sequence[int],
    widths: Sequence[int],
    style: Style,
    stem_width: int | None = None,
    imagenet_stem: bool = False,
    kernel_size: int = 3,
    layers_per_block: int = 2,
    bottleneck: bool = False,
    downsampling: str = "stride",
    shortcut_of: str = "input",
    shortcut_mod: bool = False,
    head_norm: bool = True,
    shared: int = 0,
    unshare_bn: str = "stats+affine",
) -> Net:
    """Return a net of pre-activation blocks; each stage halves the resolution.

    Weights of blocks have variance `gain^2 2/fan_in`, stem, read-out and shortcuts of
    the input 1/fan_in, shortcuts of the activation 2/fan_in; biases start at 0.

    Args:
        in_shape: Shape of one input, `(C, H, W)`.
        num_outputs: Number of outputs C.
        stages: Number of blocks in each stage.
        widths: Channels of each stage's convolutions; with bottlenecks the stage's
            output has four times as many.
        style: The switches of `Style`.
        stem_width: Channels of the stem; None: the first stage's.
        imagenet_stem: Stem of kernel 7 and stride 2 with a maximum pooling, instead of
            kernel `kernel_size` and stride 1.
        kernel_size: Of the convolutions.
        layers_per_block: Weight layers in a block without bottleneck.
        bottleneck: Blocks of three convolutions, of kernels 1, `kernel_size` and 1.
        downsampling: `stride`: by the first block of each stage but the first;
            `average`: over 2 x 2 positions after each stage.
        shortcut_of: What a shortcut convolution, where shapes change, is applied to:
            the block's `input`, or its first `activation`.
        shortcut_mod: Whether the strided shortcuts have the average of `Shortcut`.
        head_norm: Whether norm and activation come before the mean over positions.
        shared: In each stage the last `shared` blocks are one block applied again.
        unshare_bn: What of the norms they keep for themselves, see `Block.tie`.

    Raises:
        ValueError: On a value that can't be; names the option.
    """
    check_stages(stages, widths)
    choose("downsampling", downsampling, DOWNSAMPLING)
    kernel = checked_kernel(in_shape, kernel_size)
    positive("layers_per_block", layers_per_block)
    channels = positive("stem_width", widths[0] if stem_width is None else stem_width)
    draws = Draws()
    stem = make_stem(
        in_shape,
        channels,
        7 if imagenet_stem else kernel,
        2 if imagenet_stem else 1,
        draws,
        style.boundary,
        bias=style.bias,
        pool=imagenet_stem,
    )
    make_block = partial(
        _make_block,
        kernel=kernel,
        num_layers=3 if bottleneck else layers_per_block,
        bottleneck=bottleneck,
        shortcut_of=shortcut_of,
        shortcut_mod=shortcut_mod,
        style=style,
        draws=draws,
        depth=sum(stages),
    )
    growth = EXPANSION if bottleneck else 1
    strided = downsampling == "stride"
    blocks: list[Block] = []
    for own in _stages(make_block, stages, widths, channels, growth, strided=strided):
        share(own, shared, unshare_bn)
        blocks += own
    ends = () if strided else accumulate(stages)
    pools = {end - 1: nn.AvgPool2d(2) for end in ends}
    pattern = "na" if head_norm else ""
    head = make_head(
        growth * widths[-1],
        num_outputs,
        style,
        draws,
        spatial=True,
        bias=True,
        pattern=pattern,
    )
    return Net(stem, blocks, head, pools)


def check_stages(stages: Sequence[int], widths: Sequence[int]) -> None:
    """Check that there is one positive width for each positive number of blocks.

    Raises:
        ValueError: If not.
    """
    if not stages or len(stages) != len(widths):
        raise ValueError(
            "stages and widths must have one number a stage; "
            f"got stages={list(stages)}, widths={list(widths)}"
        )
    for count, width in zip(stages, widths, strict=True):
        positive("stages", count)
        positive("widths", width)


def _stages(
    make_block: Callable[..., Block],
    stages: Sequence[int],
    widths: Sequence[int],
    channels: int,
    growth: int,
    *,
    strided: bool,
) -> Iterator[list[Block]]:
    """Yield the blocks of each stage, whose outputs have `growth * width` channels."""
    index = 0
    for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
        blocks = []
        for place in range(count):
            stride = 2 if strided and stage > 0 and place == 0 else 1
            blocks.append(make_block(index, channels, width, stride=stride))
            channels = growth * width
            index += 1
        yield blocks


def _make_block(
    index: int,
    channels: int,
    width: int,
    *,
    stride: int,
    kernel: int,
    num_layers: int,
    bottleneck: bool,
    shortcut_of: str,
    shortcut_mod: bool,
    style: Style,
    draws: Draws,
    depth: int,
) -> Block:
    """Return one block, with a shortcut convolution where shapes change.

    Raises:
        ValueError: If shapes change in a normalisation-free net, whose skips can't.
    """
    variance = 1.0 if style.activation == "linear" else 2.0
    same = Layer(width, kernel, 1, kernel // 2, variance)
    if bottleneck:
        last = Layer(EXPANSION * width, 1, variance=variance)
        layers = [
            same._replace(kernel=1, padding=0),
            same._replace(stride=stride),
            last,
        ]
    else:
        layers = [same._replace(stride=stride)] + [same] * (num_layers - 1)
    out = layers[-1].out
    name = f"blocks.{index}"
    shortcut = None
    if stride > 1 or channels != out:
        if style.scale == "nf":
            raise ValueError("scale='nf' takes one stage of the stem's width")
        pooled = shortcut_mod and stride > 1
        shortcut = Shortcut(channels, out, stride, pooled=pooled, bias=style.bias)
        shortcut.draw(draws, name, variance=2.0 if shortcut_of == "activation" else 1.0)
    return Block(
        channels,
        layers,
        pattern="naw" * num_layers,
        style=style,
        draws=draws,
        name=name,
        index=index,
        depth=depth,
        shortcut=shortcut,
        shortcut_of=shortcut_of if shortcut else "input",
    )

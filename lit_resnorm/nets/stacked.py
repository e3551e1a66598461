"""Networks of equal or staged width, plain `nn.Module`s with named taps.

`stacked_net` builds the fully connected and convolutional families of constant width,
`staged_net` the convolutional training family; both from one `Block` and the switches
of one `Style`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from lit_resnorm.nets.blocks import Block, share
from lit_resnorm.nets.initialization import Draws, correlate_in_depth
from lit_resnorm.nets.layers import Layer, Style, branch_pattern, choose, positive
from lit_resnorm.nets.stem_and_head import checked_kernel, make_head, make_stem

__all__ = ["Net", "Tap", "stacked_net"]

STEMS = ("auto", "projection")
Tap = Callable[[int, str, Tensor], None]


class Net(nn.Module):
    """A stem, blocks and a head.

    Args:
        stem: From the input to the first block's.
        blocks: The blocks in order.
        head: From the last block's output to the net's.
        pools: Applied to the output of the block with this index, after its taps.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        head: nn.Module,
        pools: Mapping[int, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.pools = nn.ModuleDict({str(k): v for k, v in (pools or {}).items()})
        self.head = head
        self.num_weight_layers = sum(block.num_weight_layers for block in blocks)

    def forward(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        """Return the outputs, shape `(B, C)`.

        Args:
            x: Inputs, shape `(B, ...)`.
            tap: Called as `tap(index, name, tensor)` at each tap of each block (see
                `Block.forward`), `index` counting applications from 0: a tied block
                has an index for each of its depths. Nothing is held.
        """
        h = self.stem(x)
        for index, block in enumerate(self.blocks):
            h = block(h, None if tap is None else partial(tap, index))
            if str(index) in self.pools:
                h = self.pools[str(index)](h)
        return self.head(h)


def stacked_net(
    in_shape: Sequence[int],
    num_outputs: int,
    *,
    depth: int,
    width: int,
    style: Style,
    residual: bool = True,
    order: str = "post",
    layers_per_block: int = 2,
    kernel_size: int | None = None,
    stem: str = "auto",
    stem_stride: int = 1,
    train_stem: bool = False,
    train_head: bool = True,
    readout_bias: bool = False,
    shared: int = 0,
    unshare_bn: str = "stats+affine",
    correlation_length: float | None = None,
) -> Net:
    """Return a net of blocks of one width.

    Weights of blocks have variance `gain^2 v / fan_in`, where v is 2 for a layer whose
    input or output goes through the activation, and 1 for the last layer of a residual
    branch in `post` order and in nets with the linear activation. The read-out has
    1/width, the stem 1/fan_in. All biases start at 0.

    Args:
        in_shape: Shape of one input, `(C, H, W)` or `(D,)`.
        num_outputs: Number of outputs C.
        depth: Number of blocks.
        width: Units, or channels, of every hidden layer.
        style: The switches of `Style`.
        residual: Whether blocks have skip connections.
        order: `post` or `pre`, see `branch_pattern`.
        layers_per_block: Weight layers in a block.
        kernel_size: Of the convolutions; None: fully connected, inputs flattened.
        stem: `auto`: a fully connected net whose inputs have `width` features has
            none; `projection`: always a projection, or convolution.
        stem_stride: Stride of the convolutional stem.
        train_stem: Whether the stem's weights are trained.
        train_head: Whether the read-out is trained.
        readout_bias: Whether it has a bias.
        shared: The last `shared` blocks are one block applied again.
        unshare_bn: What of the norms they keep for themselves, see `Block.tie`.
        correlation_length: Not None: weights are a Gaussian process in depth of this
            correlation length, see `correlate_in_depth`.

    Raises:
        ValueError: On a value that can't be; names the option.
    """
    positive("depth", depth)
    positive("width", width)
    draws = Draws()
    kernel = checked_kernel(in_shape, kernel_size)
    pattern = branch_pattern(order, layers_per_block, residual=residual)
    layers = _equal_layers(width, kernel, layers_per_block, order, residual, style)
    first = make_stem(
        in_shape,
        width,
        kernel,
        stem_stride,
        draws,
        style.boundary,
        project=choose("stem", stem, STEMS) == "projection",
    )
    first.requires_grad_(train_stem)
    blocks = [
        Block(
            width,
            layers,
            pattern=pattern,
            style=style,
            draws=draws,
            name=f"blocks.{index}",
            index=index,
            depth=depth,
            residual=residual,
        )
        for index in range(depth)
    ]
    _correlate(blocks, layers_per_block, correlation_length, style)
    share(blocks, shared, unshare_bn)
    head = make_head(
        width, num_outputs, style, draws, spatial=bool(kernel), bias=readout_bias
    )
    head.requires_grad_(train_head)
    return Net(first, blocks, head)


def _equal_layers(
    width: int,
    kernel: int,
    num_layers: int,
    order: str,
    residual: bool,
    style: Style,
) -> list[Layer]:
    """Return the weight layers of one block of constant width."""
    he = 1.0 if style.activation == "linear" else 2.0
    variances = [he] * num_layers
    if residual and order == "post":
        variances[-1] = 1.0
    return [
        Layer(width, kernel, padding=kernel // 2, variance=variance)
        for variance in variances
    ]


def _correlate(
    blocks: Sequence[Block], num_layers: int, length: float | None, style: Style
) -> None:
    """Make the blocks' weights a process in depth where a length is given."""
    if length is None:
        return
    if length <= 0 or style.weight != "plain" or style.scale == "nf":
        raise ValueError(
            "correlation_length must be positive and needs plain weights; "
            f"got {length} with weight={style.weight!r}, scale={style.scale!r}"
        )
    for k in range(1, num_layers + 1):
        weights = [block.get_parameter(f"w{k}.weight") for block in blocks]
        correlate_in_depth(weights, length)

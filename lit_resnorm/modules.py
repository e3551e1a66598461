"""LightningModules: thin names over the switches of `lit_resnorm.nets`.

Every class takes `depth` (number of blocks), `width` (units or channels), `in_shape`
and `num_classes` (those of the handwritten digits unless given; the command line fills
them in from the data), the switches of `LitStack` or `LitStaged` that its name leaves
open, and the arguments of `LitClassifier`.
"""

from typing import Any

from lit_resnorm.classifier import LitClassifier
from lit_resnorm.layers import Style
from lit_resnorm.nets import stacked_net

__all__ = ["LitClassifier", "LitMLP", "LitResNet", "LitResNetBN", "LitStack"]

Shape = tuple[int, ...]
IN_SHAPE: Shape = (1, 8, 8)
NUM_CLASSES = 10


class LitStack(LitClassifier):
    """Blocks of one width, fully connected or convolutional; all switches open.

    Args:
        depth: Number of blocks.
        width: Units, or channels, of every hidden layer.
        in_shape: Shape of one input, `(C, H, W)` or `(D,)`; None: `(1, 8, 8)`.
        num_classes: Number of outputs; None: 10.
        residual: Whether blocks have skip connections.
        order: `post`: weight, norm, activation; `pre`: norm, activation, weight.
        layers_per_block: Weight layers in a block.
        norm: `none`, `batch` or `layer`.
        affine: Whether norms learn a gain and a bias.
        eps: Added to the variance by norms.
        activation: `relu`, `linear` (none), `leaky_relu`, `gelu`, `silu`, `elu`,
            `tanh`.
        gain: Multiplies the standard deviation of the blocks' weights.
        scale: What multiplies the branch: `unscaled`, `skipinit`, `rezero`, `scaled`,
            `half`, `fixup` or `nf`.
        beta: The branch's multiplier is `depth ** -beta` (scale `scaled`).
        alpha: Start of the learnt multiplier (scale `skipinit`).
        weight: `plain` or `weight_norm`.
        bias: Whether weight layers have biases.
        kernel_size: Of the convolutions; None: fully connected.
        boundary: Of convolutions: `zero_padding`, `periodic` or `symmetric`.
        stem_stride: Stride of the convolutional stem.
        train_stem: Whether the stem is trained.
        train_head: Whether the read-out is trained.
        readout_bias: Whether it has a bias.
        shared: The last `shared` blocks share their weights.
        unshare_bn: What of the norms they keep: `none`, `stats` or `stats+affine`.
        correlation_length: Not None: weights are a Gaussian process in depth, of this
            correlation length in units of the whole depth.
        **kwargs: Arguments of `LitClassifier`.

    Raises:
        ValueError: On a value that can't be; names the option.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        residual: bool = True,
        order: str = "post",
        layers_per_block: int = 2,
        norm: str = "none",
        affine: bool = False,
        eps: float = 1e-5,
        activation: str = "relu",
        gain: float = 1.0,
        scale: str = "unscaled",
        beta: float = 0.5,
        alpha: float = 0.0,
        weight: str = "plain",
        bias: bool = False,
        kernel_size: int | None = None,
        boundary: str = "zero_padding",
        stem_stride: int = 1,
        train_stem: bool = False,
        train_head: bool = True,
        readout_bias: bool = False,
        shared: int = 0,
        unshare_bn: str = "stats+affine",
        correlation_length: float | None = None,
        **kwargs: Any,
    ) -> None:
        classes = NUM_CLASSES if num_classes is None else num_classes
        style = Style(
            norm=norm,
            affine=affine,
            eps=eps,
            activation=activation,
            gain=gain,
            scale=scale,
            beta=beta,
            alpha=alpha,
            weight=weight,
            bias=bias,
            boundary=boundary,
        )
        net = stacked_net(
            IN_SHAPE if in_shape is None else in_shape,
            classes,
            depth=depth,
            width=width,
            style=style,
            residual=residual,
            order=order,
            layers_per_block=layers_per_block,
            kernel_size=kernel_size,
            stem_stride=stem_stride,
            train_stem=train_stem,
            train_head=train_head,
            readout_bias=readout_bias,
            shared=shared,
            unshare_bn=unshare_bn,
            correlation_length=correlation_length,
        )
        super().__init__(net, num_classes=classes, **kwargs)
        self.num_weight_layers = net.num_weight_layers


class LitMLP(LitStack):
    """`mlp`: `h <- relu(W h)`, W of variance 2/width."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        layers_per_block: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=False,
            layers_per_block=layers_per_block,
            **kwargs,
        )


class LitResNet(LitStack):
    """`res2`: `h <- h + W2 relu(W1 h)`; `res1` with `layers_per_block=1`."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(depth, width, in_shape, num_classes, residual=True, **kwargs)


class LitResNetBN(LitStack):
    """`res2_bn`: `h <- h + W2 relu(BN(W1 h))`."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        norm: str = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth, width, in_shape, num_classes, residual=True, norm=norm, **kwargs
        )

"""LightningModules with all switches of `lit_resnorm.nets` and `staged` open."""

from collections.abc import Sequence
from typing import Any

from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm.modules.declared import DeclaredVariant
from lit_resnorm.modules.depth_theory import DepthTheory, stack_theory
from lit_resnorm.nets import stacked_net
from lit_resnorm.nets.layers import Style
from lit_resnorm.nets.staged import staged_net

__all__ = ["IN_SHAPE", "NUM_CLASSES", "LitStack", "LitStaged", "Shape"]

Shape = tuple[int, ...]
# Those of scikit-learn's digits, the data that need no download.
IN_SHAPE: Shape = (1, 8, 8)
NUM_CLASSES = 10


class LitStack(DeclaredVariant, LitClassifier):
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
        stem: `auto`: a fully connected net whose inputs have `width` features has none;
            `projection`: always a projection, or convolution.
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
        stem: str = "auto",
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
            in_shape or IN_SHAPE,
            classes,
            depth=depth,
            width=width,
            style=style,
            residual=residual,
            order=order,
            layers_per_block=layers_per_block,
            kernel_size=kernel_size,
            stem=stem,
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
        self.depth_theory: DepthTheory = {}
        if not shared and correlation_length is None:
            self.depth_theory = stack_theory(
                style,
                depth=depth,
                residual=residual,
                order=order,
                layers_per_block=layers_per_block,
            )


class LitStaged(DeclaredVariant, LitClassifier):
    """Convolutional pre-activation blocks in stages; all switches open.

    Args:
        depth: Number of blocks; None: the sum of `stages`. Given without `stages`,
            there is one stage.
        width: Channels of the first stage; None: the first of `widths`. Given without
            `widths`, each stage has twice the channels of the one before.
        in_shape: Shape of one input, `(C, H, W)`; None: `(1, 8, 8)`.
        num_classes: Number of outputs; None: 10.
        stages: Number of blocks in each stage.
        widths: Channels of each stage.
        stem_width: Channels of the stem; None: those of the first stage.
        imagenet_stem: Stem of kernel 7 and stride 2 with a maximum pooling, instead of
            kernel `kernel_size` and stride 1.
        kernel_size: Of the convolutions.
        layers_per_block: Weight layers in a block without bottleneck.
        bottleneck: Blocks of convolutions of kernels 1, `kernel_size` and 1, the last
            to four times as many channels.
        downsampling: `stride`: by the first block of each stage but the first;
            `average`: over 2 x 2 positions after each stage.
        shortcut_of: What a shortcut convolution is applied to: the block's `input`, or
            its first `activation`.
        shortcut_mod: Whether strided shortcuts also have a scaled average.
        head_norm: Whether norm and activation come before the mean over positions.
        norm: `none`, `batch` or `layer`.
        affine: Whether norms learn a gain and a bias.
        eps: Added to the variance by norms.
        gamma_init: Start of the gain of the norms in blocks.
        activation: As for `LitStack`.
        gain: Multiplies the standard deviation of the blocks' weights.
        scale: What multiplies the branch, as for `LitStack`.
        beta: The branch's multiplier is `depth ** -beta` (scale `scaled`).
        alpha: Start of the learnt multiplier (scale `skipinit`).
        weight: `plain` or `weight_norm`.
        bias: Whether convolutions have biases.
        boundary: `zero_padding`, `periodic` or `symmetric`.
        shared: In each stage the last `shared` blocks share their weights.
        unshare_bn: What of the norms they keep: `none`, `stats` or `stats+affine`.
        **kwargs: Arguments of `LitClassifier`.

    Raises:
        ValueError: On a value that can't be; names the option.
    """

    def __init__(
        self,
        depth: int | None = None,
        width: int | None = None,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        stages: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        stem_width: int | None = None,
        imagenet_stem: bool = False,
        kernel_size: int = 3,
        layers_per_block: int = 2,
        bottleneck: bool = False,
        downsampling: str = "stride",
        shortcut_of: str = "input",
        shortcut_mod: bool = False,
        head_norm: bool = True,
        norm: str = "batch",
        affine: bool = True,
        eps: float = 1e-5,
        gamma_init: float = 1.0,
        activation: str = "relu",
        gain: float = 1.0,
        scale: str = "unscaled",
        beta: float = 0.5,
        alpha: float = 0.0,
        weight: str = "plain",
        bias: bool = True,
        boundary: str = "zero_padding",
        shared: int = 0,
        unshare_bn: str = "stats+affine",
        **kwargs: Any,
    ) -> None:
        classes = NUM_CLASSES if num_classes is None else num_classes
        blocks = all_stages(depth, stages)
        style = Style(
            norm=norm,
            affine=affine,
            eps=eps,
            gamma_init=gamma_init,
            activation=activation,
            gain=gain,
            scale=scale,
            beta=beta,
            alpha=alpha,
            weight=weight,
            bias=bias,
            boundary=boundary,
        )
        net = staged_net(
            in_shape or IN_SHAPE,
            classes,
            stages=blocks,
            widths=all_widths(width, widths, len(blocks)),
            style=style,
            stem_width=stem_width,
            imagenet_stem=imagenet_stem,
            kernel_size=kernel_size,
            layers_per_block=layers_per_block,
            bottleneck=bottleneck,
            downsampling=downsampling,
            shortcut_of=shortcut_of,
            shortcut_mod=shortcut_mod,
            head_norm=head_norm,
            shared=shared,
            unshare_bn=unshare_bn,
        )
        super().__init__(net, num_classes=classes, **kwargs)
        self.num_weight_layers = net.num_weight_layers


def all_stages(depth: int | None, stages: Sequence[int] | None) -> list[int]:
    """Return the number of blocks in each stage.

    Raises:
        ValueError: If neither is given, or they disagree.
    """
    if stages is None:
        if depth is None:
            raise ValueError("depth or stages must be given")
        return [depth]
    if depth is not None and depth != sum(stages):
        raise ValueError(f"depth={depth} isn't the sum of stages={list(stages)}")
    return list(stages)


def all_widths(
    width: int | None, widths: Sequence[int] | None, num_stages: int
) -> list[int]:
    """Return the channels of each stage.

    Raises:
        ValueError: If neither is given, or they disagree.
    """
    if widths is None:
        if width is None:
            raise ValueError("width or widths must be given")
        return [width * 2**stage for stage in range(num_stages)]
    if width is not None and [width] != list(widths[:1]):
        raise ValueError(f"width={width} isn't the first of widths={list(widths)}")
    return list(widths)

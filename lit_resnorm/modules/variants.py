"""The variants of the papers: what each fixes and what it starts from.

Options that a variant doesn't name are those of its base, `LitStack` or `LitStaged`.
"""

from typing import Any

from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm.modules.families import NUM_CLASSES, LitStack, LitStaged, Shape
from lit_resnorm.nets.layers import Style, choose
from lit_resnorm.nets.tiny import tiny_net

__all__ = [
    "LitBNFeedForward",
    "LitBNResNet",
    "LitFixup",
    "LitMLP",
    "LitMLPBN",
    "LitPreactResNet",
    "LitResNet",
    "LitResNetBN",
    "LitScaledResNet",
    "LitSharedResNet",
    "LitShortcutResNet",
    "LitSkipInit",
    "LitSmoothResNet",
    "LitTinyResNet",
    "LitVanillaNet",
    "LitWeightNormResNet",
]


class LitMLP(LitStack, fixed={"residual": False}, defaults={"layers_per_block": 1}):
    """`mlp`: `h <- relu(W h)`, W of variance 2/width."""


class LitMLPBN(
    LitStack,
    fixed={"residual": False},
    defaults={"layers_per_block": 1, "norm": "batch"},
):
    """`mlp_bn`: `h <- relu(BN(W h))`."""


class LitResNet(LitStack, fixed={"residual": True}):
    """`res2`: `h <- h + W2 relu(W1 h)`.

    With `layers_per_block=1` it is `res1`: `h <- h + relu(W h)`.
    """


class LitResNetBN(LitStack, fixed={"residual": True}, defaults={"norm": "batch"}):
    """`res2_bn`: `h <- h + W2 relu(BN(W1 h))`."""


class LitVanillaNet(
    LitStack,
    fixed={"residual": False},
    defaults={
        "layers_per_block": 1,
        "stem": "projection",
        "stem_stride": 2,
        "train_stem": True,
    },
):
    """`vanilla`: `h <- relu(W h)` after a linear stem; convolutions by `kernel_size`.

    Source: Labatie (2019), arXiv 1811.03087; so the two classes below.
    """


class LitBNFeedForward(
    LitStack,
    fixed={"residual": False},
    defaults={
        "layers_per_block": 1,
        "norm": "batch",
        "eps": 0.001,
        "stem": "projection",
        "stem_stride": 2,
        "train_stem": True,
    },
):
    """`bn_ff`: `h <- relu(BN(W h))` after a linear stem."""


class LitBNResNet(
    LitStack,
    fixed={"residual": True, "order": "pre"},
    defaults={
        "norm": "batch",
        "eps": 0.001,
        "stem": "projection",
        "stem_stride": 2,
        "train_stem": True,
    },
):
    """`bn_res`: adds to h what H times batch norm, ReLU, weight layer make of it.

    H is `layers_per_block`; `norm="none"` gives `res`.
    """


class LitScaledResNet(LitStack, fixed={"residual": True}, defaults={"scale": "scaled"}):
    """`scaled(beta)`: `h <- h + depth^-beta F(h)`; `half` and `nf` by `scale`."""


class LitSkipInit(LitStack):
    """SkipInit: `h <- h + a F(h)` with a learnt a for each block; ReZero by `rezero`.

    Source: De & Smith (2020), arXiv 2002.10444; Bachlechner et al. (2020), arXiv
    2003.04887.

    Args:
        depth: Number of blocks.
        width: Units, or channels, of every hidden layer.
        in_shape: As for `LitStack`.
        num_classes: As for `LitStack`.
        start: Of a: `zero`, or `inverse_sqrt_depth`.
        rezero: Whether it is ReZero: starts at 0, without biases unless `bias` is set.
        bias: Whether weight layers have biases; None: unless it is ReZero.
        **kwargs: Arguments of `LitStack`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        start: str = "zero",
        rezero: bool = False,
        bias: bool | None = None,
        order: str = "pre",
        **kwargs: Any,
    ) -> None:
        choose("start", start, ("zero", "inverse_sqrt_depth"))
        alpha = 0.0 if start == "zero" else max(depth, 1) ** -0.5
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            scale="rezero" if rezero else "skipinit",
            alpha=alpha,
            bias=not rezero if bias is None else bias,
            order=order,
            **kwargs,
        )


class LitFixup(LitStack, fixed={"residual": True, "scale": "fixup"}):
    """Fixup: blocks start as the identity, the net as the zero function.

    Source: Zhang, Dauphin & Ma (2019), arXiv 1901.09321, and its public code.
    """


class LitWeightNormResNet(LitStack, fixed={"residual": True, "weight": "weight_norm"}):
    """`res2` with weight rows `g v / |v|`, g starting at their He norm."""


class LitSmoothResNet(LitStack):
    """Smooth in depth: `h <- h + W_k relu(h) / depth`.

    Source: Marion (2023), arXiv 2305.06648.

    Args:
        depth: Number of blocks.
        width: Units, or channels, of every hidden layer.
        in_shape: As for `LitStack`.
        num_classes: As for `LitStack`.
        tied: Whether one W is used at all depths.
        correlation_length: Of the initial W_k, a Gaussian process in depth, in units
            of the whole depth; None: independent.
        stem: As for `LitStack`.
        train_stem: As for `LitStack`.
        beta: The branch's multiplier is `depth ** -beta`.
        **kwargs: Arguments of `LitStack`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        tied: bool = False,
        correlation_length: float | None = 0.1,
        stem: str = "projection",
        train_stem: bool = True,
        beta: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # Weights of `pre` blocks have variance 2/width, the paper's 1/width.
        gain = 0.5**0.5
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            order="pre",
            layers_per_block=1,
            scale="scaled",
            gain=gain,
            shared=depth if tied else 0,
            correlation_length=correlation_length,
            stem=stem,
            train_stem=train_stem,
            beta=beta,
            **kwargs,
        )


class LitPreactResNet(LitStaged):
    """Pre-activation residual net; one stage unless `stages` are given.

    Source: Jastrzebski et al. (2018), arXiv 1710.04773, whose nets are its presets.
    """


class LitSharedResNet(LitStaged, defaults={"shared": 13, "gamma_init": 0.1}):
    """The last `shared` blocks of each stage share convolutions but not batch norms.

    Source: Jastrzebski et al. (2018), arXiv 1710.04773.
    """


class LitShortcutResNet(
    LitStaged,
    fixed={"shortcut_of": "activation"},
    defaults={
        "width": 64,
        "stages": (2, 2, 2, 2),
        "shortcut_mod": True,
        "head_norm": False,
        "bias": False,
    },
):
    """Pre-activation ResNet-18 with an average beside its strided shortcuts.

    Source: MacDonald et al. (2022), arXiv 2210.05371, public code.
    """


class LitTinyResNet(LitClassifier):
    """Two blocks on 28 x 28 images, with three kinds of skip connection.

    Source: MacDonald et al. (2022), arXiv 2210.05371, public code.

    Args:
        in_shape: Shape of one input; None: `(1, 28, 28)`.
        num_classes: Number of outputs; None: 10.
        skips: `none`; `conv`: identity and a 1 x 1 shortcut; `pooled`: that and a
            scaled average.
        norm: `none`, `batch` or `layer`.
        activation: As for `LitStack`.
        **kwargs: Arguments of `LitClassifier`.
    """

    def __init__(
        self,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        skips: str = "conv",
        norm: str = "batch",
        activation: str = "relu",
        **kwargs: Any,
    ) -> None:
        classes = NUM_CLASSES if num_classes is None else num_classes
        style = Style(norm=norm, affine=True, bias=True, activation=activation)
        net = tiny_net(in_shape or (1, 28, 28), classes, skips=skips, style=style)
        super().__init__(net, num_classes=classes, **kwargs)
        self.num_weight_layers = net.num_weight_layers

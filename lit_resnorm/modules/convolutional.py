"""Convolutional variants: pre-activation stages, shared blocks, other shortcuts."""

from collections.abc import Sequence
from typing import Any

from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm.modules.families import NUM_CLASSES, LitStaged, Shape
from lit_resnorm.nets.layers import Style
from lit_resnorm.nets.tiny import tiny_net

__all__ = ["LitPreactResNet", "LitSharedResNet", "LitShortcutResNet", "LitTinyResNet"]


class LitPreactResNet(LitStaged):
    """Pre-activation residual net; one stage unless `stages` are given.

    Source: Jastrzebski et al. (2018), arXiv 1710.04773, whose nets are its presets.
    """

    def __init__(
        self,
        depth: int | None = None,
        width: int | None = None,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            **kwargs,
        )


class LitSharedResNet(LitStaged):
    """The last `shared` blocks of each stage share convolutions but not batch norms.

    Source: Jastrzebski et al. (2018), arXiv 1710.04773.
    """

    def __init__(
        self,
        depth: int | None = None,
        width: int | None = None,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        shared: int = 13,
        unshare_bn: str = "stats+affine",
        gamma_init: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            shared=shared,
            unshare_bn=unshare_bn,
            gamma_init=gamma_init,
            **kwargs,
        )


class LitShortcutResNet(LitStaged):
    """Pre-activation ResNet-18 with an average beside its strided shortcuts.

    Source: MacDonald et al. (2022), arXiv 2210.05371, public code.
    """

    def __init__(
        self,
        depth: int | None = None,
        width: int | None = 64,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        stages: Sequence[int] | None = (2, 2, 2, 2),
        shortcut_mod: bool = True,
        head_norm: bool = False,
        bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            shortcut_of="activation",
            stages=stages,
            shortcut_mod=shortcut_mod,
            head_norm=head_norm,
            bias=bias,
            **kwargs,
        )


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

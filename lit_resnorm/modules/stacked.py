"""The families of constant width: plain, residual, with and without batch norm."""

from typing import Any

from lit_resnorm.modules.families import LitStack, Shape

__all__ = [
    "LitBNFeedForward",
    "LitBNResNet",
    "LitMLP",
    "LitMLPBN",
    "LitResNet",
    "LitResNetBN",
    "LitVanillaNet",
]


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


class LitMLPBN(LitStack):
    """`mlp_bn`: `h <- relu(BN(W h))`."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        layers_per_block: int = 1,
        norm: str = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=False,
            layers_per_block=layers_per_block,
            norm=norm,
            **kwargs,
        )


class LitResNet(LitStack):
    """`res2`: `h <- h + W2 relu(W1 h)`.

    With `layers_per_block=1` it is `res1`: `h <- h + relu(W h)`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            **kwargs,
        )


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
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            norm=norm,
            **kwargs,
        )


class LitVanillaNet(LitStack):
    """`vanilla`: `h <- relu(W h)` after a linear stem; convolutions by `kernel_size`.

    Source: Labatie (2019), arXiv 1811.03087; so the two classes below.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        layers_per_block: int = 1,
        stem: str = "projection",
        stem_stride: int = 2,
        train_stem: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=False,
            layers_per_block=layers_per_block,
            stem=stem,
            stem_stride=stem_stride,
            train_stem=train_stem,
            **kwargs,
        )


class LitBNFeedForward(LitStack):
    """`bn_ff`: `h <- relu(BN(W h))` after a linear stem."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        layers_per_block: int = 1,
        norm: str = "batch",
        eps: float = 1e-3,
        stem: str = "projection",
        stem_stride: int = 2,
        train_stem: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=False,
            layers_per_block=layers_per_block,
            norm=norm,
            eps=eps,
            stem=stem,
            stem_stride=stem_stride,
            train_stem=train_stem,
            **kwargs,
        )


class LitBNResNet(LitStack):
    """`bn_res`: adds to h what H times batch norm, ReLU, weight layer make of it.

    H is `layers_per_block`; `norm="none"` gives `res`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        layers_per_block: int = 2,
        norm: str = "batch",
        eps: float = 1e-3,
        stem: str = "projection",
        stem_stride: int = 2,
        train_stem: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            order="pre",
            layers_per_block=layers_per_block,
            norm=norm,
            eps=eps,
            stem=stem,
            stem_stride=stem_stride,
            train_stem=train_stem,
            **kwargs,
        )

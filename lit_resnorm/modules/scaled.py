"""Variants without normalisation: their branches are scaled instead."""

from typing import Any

from lit_resnorm.modules.families import LitStack, Shape
from lit_resnorm.nets.layers import choose

__all__ = [
    "LitFixup",
    "LitScaledResNet",
    "LitSkipInit",
    "LitSmoothResNet",
    "LitWeightNormResNet",
]


class LitScaledResNet(LitStack):
    """`scaled(beta)`: `h <- h + depth^-beta F(h)`; `half` and `nf` by `scale`."""

    def __init__(
        self,
        depth: int,
        width: int,
        in_shape: Shape | None = None,
        num_classes: int | None = None,
        *,
        scale: str = "scaled",
        beta: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depth,
            width,
            in_shape,
            num_classes,
            residual=True,
            scale=scale,
            beta=beta,
            **kwargs,
        )


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


class LitFixup(LitStack):
    """Fixup: blocks start as the identity, the net as the zero function.

    Source: Zhang, Dauphin & Ma (2019), arXiv 1901.09321, and its public code.
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
            scale="fixup",
            **kwargs,
        )


class LitWeightNormResNet(LitStack):
    """`res2` with weight rows `g v / |v|`, g starting at their He norm."""

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
            weight="weight_norm",
            **kwargs,
        )


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

"""The switches that all variants share, and the layers that blocks are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_resnorm.nets.initialization import Draws

__all__ = [
    "ACTIVATIONS",
    "BOUNDARIES",
    "NORMS",
    "SCALES",
    "WEIGHTS",
    "Layer",
    "ScalarBias",
    "Scale",
    "Style",
    "branch_pattern",
    "choose",
    "draw_weights",
    "fan_in",
    "fan_out",
    "normalization",
    "positive",
    "weight_layer",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "linear": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}
BOUNDARIES: dict[str, Literal["zeros", "circular", "replicate"]] = {
    "zero_padding": "zeros",
    "periodic": "circular",
    "symmetric": "replicate",
}
NORMS = ("none", "batch", "layer")
SCALES = ("unscaled", "skipinit", "rezero", "scaled", "half", "fixup", "nf")
WEIGHTS = ("plain", "weight_norm")


def choose(option: str, value: str, choices: Sequence[str]) -> str:
    """Return `value`.

    Raises:
        ValueError: If it is none of `choices`; names the option and them.
    """
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}; got {value!r}")
    return value


def positive(option: str, value: int) -> int:
    """Return `value`.

    Raises:
        ValueError: If it is below 1; names the option.
    """
    if value < 1:
        raise ValueError(f"{option} must be at least 1; got {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class Style:
    """The switches that hold for all blocks of a net.

    Attributes:
        norm: `none`, `batch` or `layer` (over a whole example).
        affine: Whether norms learn a gain and a bias.
        eps: Added to the variance by norms.
        gamma_init: Start of the norms' gain.
        activation: A name of `ACTIVATIONS`; `linear` is none.
        scale: What multiplies the branch, a name of `SCALES` (science: residual
            branches without normalisation): 1; a learnt scalar from `alpha`
            (skipinit) or from 0 (rezero); `depth ** -beta` (scaled); both branch and
            skip by `1/sqrt(2)` (half); Fixup; normalisation-free with weight
            standardisation (nf).
        beta: Exponent of `scaled`.
        alpha: Start of skipinit's scalar.
        weight: `plain` or `weight_norm`.
        boundary: What convolutions see beyond the edge: a name of `BOUNDARIES`.
        bias: Whether weight layers have biases, which start at 0.
        gain: Multiplies the standard deviation of all weights in blocks.
    """

    norm: str = "none"
    affine: bool = False
    eps: float = 1e-5
    gamma_init: float = 1.0
    activation: str = "relu"
    scale: str = "unscaled"
    beta: float = 0.5
    alpha: float = 0.0
    weight: str = "plain"
    boundary: str = "zero_padding"
    bias: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        choose("norm", self.norm, NORMS)
        choose("activation", self.activation, tuple(ACTIVATIONS))
        choose("scale", self.scale, SCALES)
        choose("weight", self.weight, WEIGHTS)
        choose("boundary", self.boundary, tuple(BOUNDARIES))
        if self.gamma_init != 1.0 and not (self.affine and self.norm != "none"):
            raise ValueError(
                f"gamma_init={self.gamma_init} needs a norm with affine=True; "
                f"got norm={self.norm!r}, affine={self.affine}"
            )
        if self.scale == "nf" and self.weight != "plain":
            raise ValueError(f"scale='nf' needs weight='plain'; got {self.weight!r}")


class Layer(NamedTuple):
    """A weight layer: its output width and, where `kernel` isn't 0, a convolution.

    `variance` times 1/fan_in is the variance of its weights.
    """

    out: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    variance: float = 2.0


def weight_layer(
    width: int, layer: Layer, *, bias: bool = False, boundary: str = "zero_padding"
) -> nn.Linear | nn.Conv2d:
    """Return an uninitialised weight layer on `width` units or channels.

    Raises:
        ValueError: If the boundary is symmetric and the padding wider than 1, where
            torch's padding by replication is another thing.
    """
    if not layer.kernel:
        linear = nn.Linear(width, layer.out, bias=bias, device="meta")
        return linear.to_empty(device="cpu")
    if boundary == "symmetric" and layer.padding > 1:
        raise ValueError(
            "boundary='symmetric' takes kernels up to 3; "
            f"got a kernel of {layer.kernel} with padding {layer.padding}"
        )
    conv = nn.Conv2d(
        width,
        layer.out,
        layer.kernel,
        layer.stride,
        layer.padding,
        bias=bias,
        padding_mode=BOUNDARIES[boundary],
        device="meta",
    )
    return conv.to_empty(device="cpu")


@torch.no_grad()
def draw_weights(
    layer: nn.Linear | nn.Conv2d, draws: Draws, name: str, std: float
) -> None:
    """Fill a layer's weight with `std` times the draw of its name, its bias with 0."""
    layer.weight.copy_(draws.normal(f"{name}.weight", layer.weight.shape) * std)
    if layer.bias is not None:
        layer.bias.zero_()


def fan_in(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the number of inputs that each output of the layer sums over."""
    return layer.weight[0].numel()


def fan_out(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the number of outputs times that of positions that an input reaches."""
    return layer.weight[:, 0].numel()


def normalization(style: Style, width: int, *, spatial: bool) -> nn.Module:
    """Return the style's norm over `width` units, or channels where `spatial`."""
    if style.norm == "batch":
        kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
        norm = kind(width, eps=style.eps, affine=style.affine)
    elif spatial:
        norm = nn.GroupNorm(1, width, eps=style.eps, affine=style.affine)
    else:
        norm = nn.LayerNorm(width, eps=style.eps, elementwise_affine=style.affine)
    if style.affine:
        nn.init.constant_(norm.weight, style.gamma_init)
    return norm


def branch_pattern(order: str, num_layers: int, *, residual: bool) -> str:
    """Return the pattern of a branch with `num_layers` weight layers.

    Args:
        order: `post` (weight, norm, activation; without norm and activation after the
            last of several layers of a residual branch) or `pre` (norm, activation,
            weight).
        num_layers: At least 1.
        residual: Whether a skip connection goes around the branch.

    Raises:
        ValueError: On another order or fewer layers.
    """
    choose("order", order, ("post", "pre"))
    if num_layers < 1:
        raise ValueError(f"layers_per_block must be at least 1; got {num_layers}")
    if order == "pre":
        return "naw" * num_layers
    if residual and num_layers > 1:
        return "wna" * (num_layers - 1) + "w"
    return "wna" * num_layers


class Scale(nn.Module):
    """Multiply by one learnt number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        # 0-d, so that a float32 scalar doesn't promote a bf16 branch.
        self.alpha = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        """Return `alpha * x`."""
        return self.alpha * x


class ScalarBias(nn.Module):
    """Add one learnt number that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x + bias`."""
        return x + self.bias

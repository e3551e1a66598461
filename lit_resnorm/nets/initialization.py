"""Random numbers for weights, so that compared variants start from the same ones.

Every weight tensor has a generator of its own, seeded by one number from torch's
global generator (drawn once a net) and by the tensor's name. Two nets built after the
same `seed_everything` therefore agree in every tensor of equal name and shape, up to
the standard deviation that each gives it, whatever else they own, and leave the global
generator in the same state.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

__all__ = [
    "Draws",
    "ScaledStandardization",
    "activation_gain",
    "correlate_in_depth",
    "fixup_std",
    "pin_row_norm",
]


class Draws:
    """Standard normal tensors by name; consumes one number of the global generator."""

    def __init__(self) -> None:
        self.seed = int(torch.randint(2**63 - 1, ()))

    def normal(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Return the float64 standard normal tensor called `name`.

        float64 whatever the net's dtype, so that nets of different precision start
        from the same weights.

        Args:
            name: The parameter's name in the net, as `blocks.3.w1.weight`.
            shape: Its shape.

        Returns:
            float64 tensor on the CPU; the same for the same name and shape.
        """
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


@torch.no_grad()
def correlate_in_depth(weights: list[nn.Parameter], length: float) -> None:
    r"""Turn independent weights into a Gaussian process in depth, in place.

    .. math:: \operatorname{Cov}(W_k, W_{k'}) = \sigma^2
              \exp\left(-(k - k')^2 / (2 L^2 b^2)\right) \text{ for each entry}

    Source: Marion (2023), arXiv 2305.06648, smooth initialisation (public code).

    Args:
        weights: The weights of the L depths in order, of one shape, each entry drawn
            independently with standard deviation sigma.
        length: The correlation length b, in units of the whole depth.
    """
    stacked = torch.stack([weight.double() for weight in weights])
    times = torch.arange(len(weights), dtype=torch.float64) / len(weights)
    gaps = times[:, None] - times[None, :]
    # eigh and not Cholesky: the kernel is singular to rounding at any useful depth.
    values, vectors = torch.linalg.eigh(torch.exp(-(gaps**2) / (2 * length**2)))
    root = vectors * values.clamp_min(0).sqrt()
    mixed = torch.einsum("kj,j...->k...", root @ vectors.T, stacked)
    for weight, value in zip(weights, mixed, strict=True):
        weight.copy_(value)


@torch.no_grad()
def pin_row_norm(layer: nn.Module, std: float) -> None:
    """Reparametrise a weight layer as `g v / |v|` by rows, with g at its He value.

    Source: Salimans & Kingma (2016), arXiv 1602.07868, equation 2; g starts at the norm
    that a row of this standard deviation has on average instead of at its own norm.

    Args:
        layer: A linear or convolutional layer.
        std: Standard deviation of its weights at initialisation.
    """
    nn.utils.parametrizations.weight_norm(layer)
    norm = layer.get_parameter("parametrizations.weight.original0")
    direction = layer.get_parameter("parametrizations.weight.original1")
    norm.fill_(std * math.sqrt(direction[0].numel()))


class ScaledStandardization(nn.Module):
    """A parametrisation: rows of mean 0 and of norm `gain`.

    Source: Brock, De, Smith & Simonyan (2021), arXiv 2102.06171, section 2, without
    the learnable gain a row.

    Args:
        gain: See `activation_gain`; 1 for a layer that no activation precedes.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardised weight, of the same shape."""
        rows = weight.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        norm = centred.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return (self.gain * centred / norm).view_as(weight)


def activation_gain(activation: nn.Module) -> float:
    r"""Return what brings an activation of standard normal input to variance 1.

    .. math:: \gamma = \operatorname{Var}[\phi(z)]^{-1/2}, \quad z \sim N(0, 1),

    which is `sqrt(2 / (1 - 1/pi))` for ReLU.

    Source: Brock, De & Smith (2021), arXiv 2101.08692, section 4.1.

    Args:
        activation: Elementwise, without parameters.

    Returns:
        The gain, exact for ReLU and the identity, else to 1e-8: the error of the
        trapezoidal rule at a kink, for a spacing of 1e-4.
    """
    if isinstance(activation, nn.ReLU):
        return math.sqrt(2 / (1 - 1 / math.pi))
    if isinstance(activation, nn.Identity):
        return 1.0
    # beyond 12 standard deviations the density is below 1e-31
    z = torch.arange(-120_000, 120_001, dtype=torch.float64) / 10_000
    density = torch.exp(-(z**2) / 2)
    density /= density.sum()
    values = activation(z)
    mean = (values * density).sum()
    return float(((values - mean) ** 2 * density).sum() ** -0.5)


def fixup_std(fan_out: int, k: int, num_layers: int, depth: int) -> float:
    """Return Fixup's standard deviation for the k-th of a branch's weight layers.

    Source: Zhang, Dauphin & Ma (2019), arXiv 1901.09321, and its public code: 0 for the
    last layer, else He's by fan-out times `depth ** (-1 / (2 num_layers - 2))`.
    """
    if k == num_layers:
        return 0.0
    return math.sqrt(2 / fan_out) * depth ** (-1 / (2 * num_layers - 2))

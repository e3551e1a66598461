"""Second moments of rectified Gaussian pairs, and the choice of a variant."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Variant", "check_variant", "correlation", "relu_kernel", "step_kernel"]

Variant = Literal["mlp", "res2", "res2_bn"]


def check_variant(variant: str) -> Variant:
    """Return `variant` if it is one of the three of the theory.

    Raises:
        ValueError: If it is not; names it and the choices.
    """
    for known in get_args(Variant):
        if variant == known:
            return known
    choices = ", ".join(get_args(Variant))
    raise ValueError(f"variant must be one of {choices}; got {variant!r}")


def relu_kernel(c: Tensor | float) -> Tensor:
    r"""Return the second moment of two rectified Gaussians over its value at c = 1.

    .. math:: \psi(c) = (\sin\theta + (\pi - \theta)\cos\theta) / \pi,
              \quad \theta = \arccos c

    For a zero-mean Gaussian pair of variances s1, s2 and correlation c,
    `E relu relu = sqrt(s1 s2) psi(c) / 2`.

    Source: Furusho & Ikeda (2019), PMLR 101, section 3 [P].

    Args:
        c: Correlations in [-1, 1]; beyond by rounding is taken as the end.

    Returns:
        float64 tensor in [0, 1] of the same shape.
    """
    angle = _angle(c)
    return (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi


def step_kernel(c: Tensor | float) -> Tensor:
    r"""Return the chance that two Gaussians are both positive, over its value at c = 1.

    .. math:: \kappa(c) = 1 - \arccos(c) / \pi, \quad E\,1[u>0]\,1[v>0] = \kappa(c)/2

    Source: Furusho & Ikeda (2019), PMLR 101, section 3 [P].

    Args:
        c: Correlations in [-1, 1].

    Returns:
        float64 tensor in [0, 1] of the same shape.
    """
    return 1 - _angle(c) / math.pi


def correlation(kernel_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the correlations of a kernel, and the products of its deviations.

    Args:
        kernel_NN: Symmetric, positive on the diagonal.

    Returns:
        `c_NN` in [-1, 1] with ones on the diagonal, and `scale_NN` with
        `kernel = c * scale`.

    Raises:
        ValueError: If an example has no power.
    """
    power_N = kernel_NN.diagonal()
    if not bool((power_N > 0).all()):
        raise ValueError("the kernel has a zero on its diagonal: an example is zero")
    scale_NN = (power_N[:, None] * power_N[None, :]).sqrt()
    c_NN = (kernel_NN / scale_NN).clamp(-1, 1)
    return c_NN.fill_diagonal_(1.0), scale_NN


def _angle(c: Tensor | float) -> Tensor:
    return torch.as_tensor(c, dtype=torch.float64).clamp(-1, 1).arccos()

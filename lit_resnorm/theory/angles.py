"""Angles between two examples, and units that both activate, by depth."""

import math

import torch
from torch import Tensor

from lit_resnorm.theory.kernels import check_variant, correlation, relu_kernel

__all__ = ["angle_asymptote", "angles", "coactivation", "kernel_angles", "next_angle"]


def next_angle(variant: str, angle: Tensor | float, index: int = 0) -> Tensor:
    r"""Return the angle between two examples after a block.

    .. math::
        \theta' = \arccos\psi, \quad \arccos((\psi + \cos\theta)/2), \quad
        \arccos((\psi + (l + 2)\cos\theta)/(l + 3))

    for mlp, res2, and res2_bn with the population variance `l + 2`. A real batch
    shrinks angles more slowly than the last: see `fisher_theory(...).kernels`.

    Source: Furusho & Ikeda (2019), PMLR 101, Theorems 1 to 3 [P].

    Args:
        variant: `mlp`, `res2` or `res2_bn`.
        angle: Angles before the block, in radians.
        index: The block's index l, from 0; only res2_bn depends on it.

    Returns:
        float64 tensor of the same shape, radians.
    """
    cosine = torch.as_tensor(angle, dtype=torch.float64).cos()
    psi = relu_kernel(cosine)
    kind = check_variant(variant)
    if kind == "mlp":
        return psi.clamp(-1, 1).arccos()
    weight = 1 if kind == "res2" else index + 2
    return ((psi + weight * cosine) / (1 + weight)).clamp(-1, 1).arccos()


def angles(variant: str, angle: Tensor | float, depth: int) -> Tensor:
    """Return the angle of two examples before each block and after the last.

    Source: `next_angle`, iterated [P].

    Args:
        variant: `mlp`, `res2` or `res2_bn`.
        angle: Angles of the inputs, in radians.
        depth: Number of blocks L.

    Returns:
        float64 tensor of shape `(L + 1, ...)`, radians.
    """
    path = [torch.as_tensor(angle, dtype=torch.float64)]
    for index in range(depth):
        path.append(next_angle(variant, path[-1], index))
    return torch.stack(path)


def angle_asymptote(variant: str, depth: Tensor | float) -> Tensor:
    r"""Return what the angle of any two examples tends to in deep nets.

    .. math:: 3\pi / L \text{ (mlp)}, \quad 6\pi / L \text{ (res2)}

    Source: derived from the recursions [D]. The published corollary is exponential
    in depth; it linearises the recursion and holds at moderate depth only.

    Args:
        variant: `mlp` or `res2`.
        depth: Number of blocks L.

    Returns:
        float64 tensor, radians.

    Raises:
        ValueError: For res2_bn, whose angle falls like a logarithm of depth.
    """
    if check_variant(variant) == "res2_bn":
        raise ValueError("variant 'res2_bn' has no power law: its angle falls slower")
    factor = 3 if variant == "mlp" else 6
    return factor * math.pi / torch.as_tensor(depth, dtype=torch.float64)


def coactivation(angle: Tensor | float) -> Tensor:
    r"""Return the share of units that are active for both of two examples.

    .. math:: (1 - \theta / \pi) / 2

    Source: Furusho & Ikeda (2019), PMLR 101 [P].

    Args:
        angle: Angle of the two at the layer's input, in radians.

    Returns:
        float64 tensor in [0, 1/2].
    """
    return (1 - torch.as_tensor(angle, dtype=torch.float64) / math.pi) / 2


def kernel_angles(kernel_NN: Tensor) -> Tensor:
    """Return the angles between examples.

    Args:
        kernel_NN: Their inner products, positive on the diagonal.

    Returns:
        Shape `(N, N)`, float64, radians, zeros on the diagonal.

    Raises:
        ValueError: If an example is zero.
    """
    return correlation(kernel_NN.double())[0].arccos()

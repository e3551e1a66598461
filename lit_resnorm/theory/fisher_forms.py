"""Closed forms of the Fisher information of random nets; see `theory.fisher`."""

import math

from lit_resnorm.theory.kernels import check_variant

__all__ = [
    "BN_GROWTH_EXPONENT",
    "averaged_maxima",
    "forward_power",
    "max_eigenvalue_asymptote",
    "mean_eigenvalue",
]

BN_GROWTH_EXPONENT = 1 / (1 - 1 / math.pi) - 1
"""Mean eigenvalue of res2_bn grows as depth to this power for large batches [D]."""


def forward_power(variant: str, index: int) -> float:
    """Return `q^l`, the mean square of the state that enters block l, for `q^0 = 1`.

    1 for mlp, `2^l` for res2, `1 + l/2` for res2_bn with population variances.

    Source: derived [D]; Furusho & Ikeda (2019), PMLR 101, for the variances [P].
    """
    kind = check_variant(variant)
    if kind == "mlp":
        return 1.0
    return 2.0**index if kind == "res2" else 1 + index / 2


def mean_eigenvalue(variant: str, depth: int, width: int) -> float:
    r"""Return the mean Fisher eigenvalue over the blocks' weights for `q^0 = 1`.

    .. math:: \frac{1}{2D}, \quad \frac{3 \cdot 2^L}{8 D}, \quad
              \frac{3 (L + 2)(H_{L+2} - 3/2)}{8 D L}

    for mlp, res2 and res2_bn with population variances; H are harmonic numbers.

    Source: derived [D]; consistent with the abstract of Furusho & Ikeda (2019),
    INNS BDDL: constant, exponential, sub-linear [A].

    Args:
        variant: `mlp`, `res2` or `res2_bn`.
        depth: Number of blocks L.
        width: D.
    """
    kind = check_variant(variant)
    if kind == "mlp":
        return 1 / (2 * width)
    if kind == "res2":
        return 3 * 2.0**depth / (8 * width)
    harmonic = sum(1 / k for k in range(1, depth + 3))
    return 3 * (depth + 2) * (harmonic - 1.5) / (8 * width * depth)


def max_eigenvalue_asymptote(variant: str, depth: int, width: int) -> float:
    """Return the largest eigenvalue's asymptote for many independent examples.

    `L D / 8` for mlp; about `0.22 L 2^L D` for res2 (a fitted factor).

    Source: derived [D].

    Raises:
        ValueError: For res2_bn, which has no simple form.
    """
    kind = check_variant(variant)
    if kind == "mlp":
        return depth * width / 8
    if kind == "res2":
        return 0.22 * depth * 2.0**depth * width
    raise ValueError("variant 'res2_bn' has no closed form; use fisher_theory(...).max")


def averaged_maxima(variant: str, depth: int, width: int) -> tuple[float, ...]:
    """Return each weight matrix's largest eigenvalue of the weight-averaged Fisher.

    The Fisher matrix is averaged over weights and over independent inputs with
    `q^0 = 1`, and cut to the block of one weight matrix. The whole matrix has larger
    eigenvalues, since its blocks between layers don't vanish.

    Source: derived [D]. res2_bn has population variances.

    Args:
        variant: `mlp`, `res2` or `res2_bn`.
        depth: Number of blocks L.
        width: D.

    Returns:
        One value for each weight matrix, in order of execution: the first, of each
        block with two, is that of W1.
    """
    kind = check_variant(variant)
    # largest eigenvalue of E[a a^T] for rectified a of unit mean square
    rectified = (1 - 1 / math.pi) + width / math.pi
    if kind == "mlp":
        hidden = rectified / (2 * width)
        return (1 / (2 * width), *[hidden] * (depth - 1))
    if kind == "res2":
        pair = (2.0 ** (depth - 2) / width, 2.0 ** (depth - 1) * rectified / width)
        return pair * depth
    values = []
    for index in range(depth):
        after = (depth + 2) / (index + 3)
        values += [after / (4 * width), after * rectified / (2 * width)]
    return tuple(values)

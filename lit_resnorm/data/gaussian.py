"""Gaussian inputs with the targets of a random teacher.

Dimensions: N examples, D features, K classes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_resnorm.data.datamodule import DataModule, check_at_least
from lit_resnorm.data.examples import Examples
from lit_resnorm.data.labelled import check_label_noise, flipped_labels
from lit_resnorm.data.sampling import stream

GaussianKind = Literal["gauss", "gauss_mean", "powerlaw"]


def powerlaw_factor(dim: int, rng: np.random.Generator) -> np.ndarray:
    """Return A with A A^T of eigenvalues proportional to 1/k and trace `dim`.

    The directions are random: as in images, features have nearly equal variances and
    it is the correlations that carry the spectrum.
    """
    spectrum_D = 1 / np.arange(1, dim + 1)
    directions_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return directions_DD * np.sqrt(spectrum_D * dim / spectrum_D.sum())


def gaussian_inputs(
    kind: GaussianKind, sizes: Sequence[int], dim: int, seed: int
) -> list[Tensor]:
    """Return the Gaussian inputs of each split.

    - `gauss`: independent N(0, 1), each feature centred by the first split's mean, each
      example then rescaled to norm sqrt(dim).
    - `gauss_mean`: m/2 + noise, m and noise of independent N(0, 1), one m for all; each
      example rescaled to norm sqrt(dim). Two examples correlate by about 1/5.
    - `powerlaw`: zero mean, covariance of eigenvalues proportional to 1/k, trace dim.

    Returns:
        Float64 tensors of shape `(size, dim)`.
    """
    shared = stream("shared", seed)
    drawn = [
        stream("inputs", seed, split).standard_normal((size, dim))
        for split, size in enumerate(sizes)
    ]
    if kind == "powerlaw":
        factor_DD = powerlaw_factor(dim, shared)
        return [torch.from_numpy(x_ND @ factor_DD.T) for x_ND in drawn]
    shift_D = shared.standard_normal(dim) / 2
    if kind == "gauss":
        shift_D = -drawn[0].mean(0)
    moved = [torch.from_numpy(x_ND + shift_D) for x_ND in drawn]
    return [x_ND * math.sqrt(dim) / x_ND.norm(dim=1, keepdim=True) for x_ND in moved]


class Gaussian(DataModule):
    """Gaussian inputs, `(D,)`, with the targets of a random linear teacher.

    The teacher is `t = T x / sqrt(D)`, T of independent N(0, 1): each output has unit
    variance over inputs of norm sqrt(D). Inputs are those of
    `lit_resnorm.datasets.gaussian_inputs`.

    Args:
        kind: Law of the inputs.
        dim: Number of features D.
        num_train: Training examples.
        num_val: Validation examples.
        num_test: Test examples.
        num_classes: Number of classes, or of outputs where targets are real.
        targets: `classes` for the largest output's number, `real` for the outputs
            themselves (float, for `loss: mse`).
        label_noise: Share of the training labels that are changed to another class.
        kwargs: Options of every `DataModule`.
    """

    def __init__(
        self,
        *,
        kind: GaussianKind = "gauss",
        dim: int = 100,
        num_train: int = 1000,
        num_val: int = 1000,
        num_test: int = 1000,
        num_classes: int = 10,
        targets: Literal["classes", "real"] = "classes",
        label_noise: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in (kinds := get_args(GaussianKind)):
            raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
        if targets not in ("classes", "real"):
            raise ValueError(f"targets must be classes or real, got {targets!r}")
        sizes = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        check_at_least(1, dim=dim, num_classes=num_classes, **sizes)
        if label_noise and targets == "real":
            raise ValueError(f"label_noise {label_noise} needs targets: classes")
        check_label_noise(label_noise, num_classes)
        self.kind: GaussianKind = kind
        self.sizes = num_train, num_val, num_test
        self.targets, self.label_noise = targets, label_noise
        self.input_shape, self.num_classes = (dim,), num_classes

    def splits(self) -> tuple[Examples, Examples, Examples]:
        """Return training, validation and test set."""
        (dim,) = self.input_shape
        inputs = gaussian_inputs(self.kind, self.sizes, dim, self.seed)
        teacher = stream("teacher", self.seed).standard_normal((dim, self.num_classes))
        outputs = [x_ND @ torch.from_numpy(teacher) / dim**0.5 for x_ND in inputs]
        if self.targets == "real":
            targets = [output_NK.float() for output_NK in outputs]
        else:
            targets = [output_NK.argmax(1) for output_NK in outputs]
            targets[0] = flipped_labels(
                targets[0], self.label_noise, self.num_classes, self.seed
            )
        train, val, test = (
            Examples(x_ND.float(), y, with_index=self.with_index)
            for x_ND, y in zip(inputs, targets, strict=True)
        )
        return train, val, test

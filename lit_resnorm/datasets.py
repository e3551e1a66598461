"""Examples in memory or on disk, and what is done to them before training.

Dimensions: N examples, C channels, H and W pixels, D features, K classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity

from lit_resnorm.sampling import BatchKey, stream

GaussianKind = Literal["gauss", "gauss_mean", "powerlaw"]


class Examples:
    """Inputs and targets in memory; a batch is one indexing operation.

    Args:
        x: Inputs, shape `(N, ...)`, float.
        y: Targets, shape `(N,)`, int64, or `(N, K)`, float.
        augment: Changes a batch of inputs as its key says.
        with_index: Whether batches are `(x, y, index)` rather than `(x, y)`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        augment: Callable[[Tensor, BatchKey], Tensor] | None = None,
        with_index: bool = False,
    ) -> None:
        self.x, self.y = x, y
        self.augment, self.with_index = augment, with_index

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, ...]:
        index = torch.from_numpy(key.indices)
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        if self.augment is not None:
            x = self.augment(x, key)
        return (x, y, index) if self.with_index else (x, y)


class ShiftAndFlip:
    """Shifts each image by up to `shift` pixels a direction, and may mirror it.

    The draw is a function of seed, epoch and example. What comes in at the edge is
    `background` (the usual random crop after padding).

    Args:
        size: Number of examples.
        shift: Largest shift in pixels.
        flip: Whether half of the images are mirrored left to right.
        background_C: Value of each channel outside of the image.
        seed: Non-negative seed.
    """

    def __init__(
        self, size: int, shift: int, *, flip: bool, background_C: Tensor, seed: int
    ) -> None:
        self.size, self.shift, self.flip, self.seed = size, shift, flip, seed
        self.background_C = background_C
        self._latest: tuple[int, np.ndarray] = (-1, np.empty((0, 3), dtype=np.int64))

    def _draws(self, epoch: int) -> np.ndarray:
        if self._latest[0] != epoch:
            rng = stream("augment", self.seed, epoch)
            shifts_N2 = rng.integers(2 * self.shift + 1, size=(self.size, 2))
            mirrored_N1 = rng.integers(2, size=(self.size, 1))
            self._latest = epoch, np.concatenate([shifts_N2, mirrored_N1], axis=1)
        return self._latest[1]

    def __call__(self, x_BCHW: Tensor, key: BatchKey) -> Tensor:
        """Return the batch that belongs to `key`, shifted and mirrored."""
        draws_B3 = torch.from_numpy(self._draws(key.epoch)[key.indices])
        height, width = x_BCHW.shape[-2:]
        rows_BH = draws_B3[:, :1] + torch.arange(height)
        columns_BW = draws_B3[:, 1:2] + torch.arange(width)
        if self.flip:
            mirrored_B1 = draws_B3[:, 2:] == 1
            columns_BW = torch.where(mirrored_B1, columns_BW.flip(1), columns_BW)
        background_C11 = self.background_C[:, None, None]
        padded = F.pad(x_BCHW - background_C11, (self.shift,) * 4)
        examples_B11 = torch.arange(len(x_BCHW))[:, None, None]
        cropped_BHWC = padded[examples_B11, :, rows_BH[:, :, None], columns_BW[:, None]]
        return cropped_BHWC.permute(0, 3, 1, 2).contiguous() + background_C11


class ImageFiles:
    """Images that are read from disk when a batch asks for them.

    Args:
        paths: Image files.
        y: Labels, shape `(N,)`, int64.
        transform: From an RGB PIL image to a tensor; may draw from torch's global
            generator, which then starts from (seed, epoch, example).
        seed: Non-negative seed.
        with_index: Whether batches are `(x, y, index)` rather than `(x, y)`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        y: Tensor,
        transform: Callable[..., Tensor],
        *,
        seed: int,
        with_index: bool = False,
    ) -> None:
        self.paths, self.y, self.transform = paths, y, transform
        self.seed, self.with_index = seed, with_index

    def __len__(self) -> int:
        return len(self.paths)

    def _image(self, epoch: int, index: int) -> Tensor:
        try:
            image = default_loader(self.paths[index])
        except (OSError, SyntaxError) as error:
            raise ValueError(f"damaged image {self.paths[index]}: {error}") from error
        seed = stream("augment", self.seed, epoch, index).integers(2**63)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too.
            torch.default_generator.manual_seed(int(seed))
            return self.transform(image)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, ...]:
        index = torch.from_numpy(key.indices)
        x = torch.stack([self._image(key.epoch, i) for i in key.indices.tolist()])
        return (x, self.y[index], index) if self.with_index else (x, self.y[index])


def check_files(root: Path, files: Mapping[str, str], hint: str) -> None:
    """Check that a data set's files are there and undamaged.

    Args:
        root: Folder that holds the data sets.
        files: MD5 sums by path relative to `root`.
        hint: How to get the files.

    Raises:
        FileNotFoundError: If a file isn't there; says how to get it.
        ValueError: If a file's MD5 sum is another one.
    """
    for name, md5 in files.items():
        path = root / name
        if not path.is_file():
            absent = path if root.is_dir() else root
            raise FileNotFoundError(f"data.root {str(root)!r}: no {absent}; {hint}")
        if not check_integrity(str(path), md5):
            raise ValueError(
                f"data.root {str(root)!r}: {path} is damaged (its MD5 isn't {md5}); "
                f"remove it, then {hint}"
            )


def class_numbers(
    classes: Sequence[int | str] | None, names: Sequence[str]
) -> list[int]:
    """Return the numbers of the classes that are asked for, in the order given.

    Raises:
        ValueError: If the list is empty, or names an unknown class, one twice, or one
            whose name isn't unique.
    """
    if classes is None:
        return list(range(len(names)))
    if not classes:
        raise ValueError("classes: the list is empty; leave it out to have all classes")
    numbers = []
    for wanted in classes:
        if isinstance(wanted, str) and names.count(wanted) > 1:
            raise ValueError(f"classes: {wanted!r} names two classes; give its number")
        known = range(len(names)) if isinstance(wanted, int) else names
        if wanted not in known:
            raise ValueError(
                f"classes: unknown class {wanted!r}; there are the numbers 0 to "
                f"{len(names) - 1} and names such as {names[0]!r}"
            )
        numbers.append(wanted if isinstance(wanted, int) else names.index(wanted))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"classes: a class is named twice in {list(classes)}")
    return numbers


def relabelled(y_N: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which examples are of the given classes, and their labels from 0 on.

    Args:
        y_N: Labels, int64.
        numbers: Class numbers; the i-th becomes label i.

    Returns:
        Indices of the examples in their order, and new labels, both int64.
    """
    new = torch.full((max(int(y_N.max()), *numbers) + 1,), -1)
    new[torch.tensor(numbers)] = torch.arange(len(numbers))
    keep = (new[y_N] >= 0).nonzero().squeeze(1)
    return keep, new[y_N[keep]]


def flipped_labels(y_N: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Return labels of which a share, rounded to whole examples, are false.

    Which ones is drawn without replacement; each gets one of the other classes, all
    equally likely.
    """
    rng = stream("label noise", seed)
    chosen = rng.choice(len(y_N), size=round(share * len(y_N)), replace=False)
    offset = torch.from_numpy(rng.integers(1, max(num_classes, 2), size=len(chosen)))
    flipped = y_N.clone()
    flipped[chosen] = (flipped[chosen] + offset) % num_classes
    return flipped


def channel_statistics(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over examples and positions.

    Args:
        x_NCHW: Images, uint8.

    Returns:
        Two float64 tensors of shape `(C,)` in units of x, exact; 1 stands in for the
        deviation of a channel that is constant.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts_CV = torch.stack(
        [torch.bincount(x.flatten(), minlength=256) for x in x_NCHW.unbind(1)]
    ).double()
    total = counts_CV.sum(1)
    mean_C = counts_CV @ values / total
    variance_C = (counts_CV * (values - mean_C[:, None]) ** 2).sum(1) / total
    return mean_C, torch.where(variance_C > 0, variance_C, 1.0).sqrt()


def pca_whitening(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and map that take x to uncorrelated features of unit variance.

    `(x - mean) @ map` has the principal components as features, by falling variance,
    each divided by its standard deviation over the N examples. Features beyond the
    numerical rank of the centred examples are zero.

    Args:
        x_ND: Examples, any real dtype.

    Returns:
        Mean, shape `(D,)`, and map, shape `(D, D)`, float64.
    """
    num_examples, num_features = x_ND.shape
    x_ND = x_ND.double()
    mean_D = x_ND.mean(0)
    # R has the examples' singular values and right vectors, and is small.
    r = torch.linalg.qr(x_ND - mean_D, mode="r").R
    _, scales, directions = torch.linalg.svd(r, full_matrices=False)
    tolerance = max(num_examples, num_features) * torch.finfo(torch.float64).eps
    rank = int((scales > scales[0] * tolerance).sum())
    map_DD = x_ND.new_zeros(num_features, num_features)
    map_DD[:, :rank] = directions[:rank].T / scales[:rank] * math.sqrt(num_examples)
    return mean_D, map_DD


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

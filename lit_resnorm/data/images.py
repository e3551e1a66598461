"""Small images in memory: standardising, whitening, scikit-learn's digits.

Dimensions: N examples, C channels, H and W pixels, D features.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lit_resnorm.data.examples import Examples, ShiftAndFlip
from lit_resnorm.data.labelled import LabelledData
from lit_resnorm.data.sampling import stream


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


class ImagesInMemory(LabelledData):
    """Small images, kept in memory as standardised floats.

    Inputs are standardised by channel, over the training set's examples and positions.

    Args:
        whiten: Whether inputs are flattened and PCA-whitened to unit variance instead
            (Furusho & Ikeda 2019), as fitted on the training set. They are then of
            shape `(D,)`, principal components by falling variance; beyond the rank of
            the training set they are zero.
        augment: Whether training images are shifted at random and, where that keeps
            their meaning, mirrored.
        kwargs: Options of every `LabelledData`.
    """

    image_shape: ClassVar[tuple[int, int, int]]
    shift: ClassVar[int]
    flip: ClassVar[bool] = False

    def __init__(
        self, *, whiten: bool = False, augment: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if whiten and augment:
            raise ValueError("whiten and augment exclude each other: both are true")
        self.whiten, self.augment = whiten, augment
        channels, height, width = self.image_shape
        self.input_shape = (channels * height * width,) if whiten else self.image_shape

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images and labels of the pool, then of the test set.

        Images are uint8, shape `(N, C, H, W)`; labels int64, shape `(N,)`.
        """

    def splits(self) -> tuple[Examples, Examples, Examples]:
        """Return training, validation and test set.

        Raises:
            ValueError: If more examples are asked for than there are.
            FileNotFoundError: If the data set's files aren't there.
        """
        pool_x, pool_y, test_x, test_y = self.load()
        (train, val, test), labels = self.choose(pool_y, test_y)
        held_out = pool_x if self.num_val != 0 else test_x
        images = [pool_x[train], held_out[val], test_x[test]]
        mean_C, std_C = channel_statistics(images[0])
        if self.whiten:
            mean_D, map_DD = pca_whitening(images[0].flatten(1))
            inputs = [((x.flatten(1) - mean_D) @ map_DD).float() for x in images]
        else:
            mean_C11, std_C11 = mean_C[:, None, None], std_C[:, None, None]
            inputs = [
                x.float().sub_(mean_C11.float()).div_(std_C11.float()) for x in images
            ]
        augment = None
        if self.augment:
            augment = ShiftAndFlip(
                len(train),
                self.shift,
                flip=self.flip,
                background_C=(-mean_C / std_C).float(),
                seed=self.seed,
            )
        return (
            Examples(inputs[0], labels[0], augment=augment, with_index=self.with_index),
            Examples(inputs[1], labels[1], with_index=self.with_index),
            Examples(inputs[2], labels[2], with_index=self.with_index),
        )


class Digits(ImagesInMemory):
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, `(1, 8, 8)`; nothing to download.

    The test set is 360 of them, the same for every seed. Augmentation shifts by one
    pixel.
    """

    image_shape = (1, 8, 8)
    shift = 1
    class_names = tuple("0123456789")

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images and labels of the pool, then of the test set."""
        pixels, targets = load_digits(return_X_y=True)
        x = torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).view(-1, 1, 8, 8)
        y = torch.from_numpy(np.asarray(targets, dtype=np.int64))
        order = torch.from_numpy(stream("digits").permutation(len(y)))
        pool, test = order[360:], order[:360]
        return x[pool], y[pool], x[test], y[test]

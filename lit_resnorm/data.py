"""DataModules: images, from files or scikit-learn, and Gaussian inputs.

Options, splits and loaders are those of `lit_resnorm.datamodule`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lit_resnorm.datamodule import ImagesInMemory
from lit_resnorm.sampling import stream


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

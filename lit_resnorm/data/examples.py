"""Examples in memory, and random changes of images.

Dimensions: N examples of the set, B of the batch, C channels, H and W pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lit_resnorm.data.sampling import BatchKey, stream


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
    """Shifts each image by up to `shift` pixels either way, and may mirror it.

    The draw is a function of seed, epoch and example. What comes in at the edge is
    `background` (the usual random crop after padding).

    Args:
        size: Number of examples.
        shift: Largest shift in pixels, at least 1.
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
        top_B, left_B, mirror_B = draws_B3.unbind(1)
        padded = self.background_C[:, None, None].repeat(
            len(x_BCHW), 1, height + 2 * self.shift, width + 2 * self.shift
        )
        inner = slice(self.shift, -self.shift)
        padded[:, :, inner, inner] = x_BCHW
        # A view of all crops; indexing copies the one of each example.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        shifted_BCHW = crops[torch.arange(len(x_BCHW)), :, top_B, left_B]
        if not self.flip:
            return shifted_BCHW
        mirrored = (mirror_B == 1)[:, None, None, None]
        return torch.where(mirrored, shifted_BCHW.flip(3), shifted_BCHW)

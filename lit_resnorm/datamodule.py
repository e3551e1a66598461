"""What all DataModules share: options, splits, loaders.

Splits are made with `seed`: a random order of the examples of the chosen classes gives
the validation set first, then the training set (a plain random subset, not a stratified
one). So the validation set is the same for each `num_train`, and a smaller training set
is part of a larger one. The test set is the data set's own and doesn't depend on
`seed`. Orders and augmentation follow `lit_resnorm.sampling`: a resumed run sees what
the unbroken one would have seen.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_resnorm.datasets import (
    Examples,
    ShiftAndFlip,
    channel_statistics,
    class_numbers,
    flipped_labels,
    pca_whitening,
    relabelled,
)
from lit_resnorm.sampling import (
    BatchDataset,
    EpochSampler,
    EvalBatchSampler,
    Loader,
    ResumableLoader,
    SkipBatchSampler,
    stream,
)


def check_at_least(least: int, **options: int | None) -> None:
    """Raise ValueError for the first option that is given and too small."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_label_noise(share: float, num_classes: int) -> None:
    """Raise ValueError if labels can't be changed to this share."""
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise must be a share from 0 to 1, got {share}")
    if share and num_classes < 2:
        raise ValueError(f"label_noise {share} needs two classes, there is one")


class DataModule(LightningDataModule):
    """Three sets of examples, and loaders that resume and share out exactly.

    Training: every rank makes the same number of steps (`EpochSampler`), and the place
    in the epoch is in each checkpoint. Evaluation: each example counts once over all
    ranks, which make the same number of batches (`EvalBatchSampler`). Lightning's own
    distributed sampler isn't put in, whatever `use_distributed_sampler` says.
    `Trainer(overfit_batches=...)` takes the first training examples, in order.

    Args:
        batch_size: Examples a batch and process.
        num_workers: Processes that load data. None of them for sets in memory, which
            are faster without, unless `augment` is the bottleneck.
        drop_last: Whether a last training batch that isn't full is left out.
        with_index: Whether batches are `(x, y, index)`, with the place in the set.
        seed: Non-negative seed of splits, noise, orders and augmentation.

    Attributes:
        input_shape: Shape of one input, `(C, H, W)` or `(D,)`.
        num_classes: Number of classes, or of outputs where targets are real.
        train_set: The training set; like the next two, known after `setup`.
        val_set: The validation set.
        test_set: The test set.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    train_set: BatchDataset
    val_set: BatchDataset
    test_set: BatchDataset

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        drop_last: bool = False,
        with_index: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers, seed=seed)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.drop_last, self.with_index, self.seed = drop_last, with_index, seed

    @abstractmethod
    def splits(self) -> tuple[BatchDataset, BatchDataset, BatchDataset]:
        """Return training, validation and test set."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Make the three sets, once."""
        if not hasattr(self, "train_set"):
            self.train_set, self.val_set, self.test_set = self.splits()

    def _ranks(self) -> dict[str, int]:
        sharing = getattr(self.trainer, "distributed_sampler_kwargs", None)
        if not sharing:
            return {"rank": 0, "world": 1}
        return {"rank": sharing["rank"], "world": sharing["num_replicas"]}

    def _loading(self) -> dict[str, Any]:
        on_cuda = (
            self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda"
        )
        return {"num_workers": self.num_workers, "pin_memory": on_cuda}

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's part of the training set, shuffled."""
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        order = EpochSampler(
            len(self.train_set), self.seed, shuffle=shuffle, **self._ranks()
        )
        batches = SkipBatchSampler(order, self.batch_size, drop_last=self.drop_last)
        return ResumableLoader(self.train_set, batches, **self._loading())

    def _eval_dataloader(self, examples: BatchDataset) -> Loader:
        batches = EvalBatchSampler(len(examples), self.batch_size, **self._ranks())
        return Loader(examples, batches, **self._loading())

    def val_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the validation set."""
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the test set."""
        return self._eval_dataloader(self.test_set)

    def predict_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the test set."""
        return self.test_dataloader()

    def probe_dataloader(self) -> Loader:
        """Return a loader of the whole validation set, in order, on every rank."""
        batches = EvalBatchSampler(len(self.val_set), self.batch_size)
        return Loader(self.val_set, batches)


class LabelledData(DataModule):
    """A pool of labelled examples to take training and validation sets from.

    Args:
        num_train: Training examples; default all that aren't in the validation set.
        num_val: Validation examples, held out of the pool; default a tenth of it, at
            most 10,000. With 0 the test set is the validation set too, as in papers
            that train on all there is.
        num_test: Test examples, the first so many; default all.
        classes: Classes to take, by number or name; labels are 0, 1, ... in this order.
        label_noise: Share of the training labels that are changed to another class.
        kwargs: Options of every `DataModule`.
    """

    class_names: ClassVar[Sequence[str]]

    def __init__(
        self,
        *,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        classes: list[int | str] | None = None,
        label_noise: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(1, num_train=num_train, num_test=num_test)
        check_at_least(0, num_val=num_val)
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        self.classes = class_numbers(classes, self.class_names)
        self.num_classes = len(self.classes)
        check_label_noise(label_noise, self.num_classes)
        self.label_noise = label_noise

    def choose(
        self, pool_y: Tensor, test_y: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return indices and new labels of training, validation and test set.

        Args:
            pool_y: Labels of the pool, shape `(N,)`, int64.
            test_y: Labels of the test examples, likewise.

        Returns:
            Indices and labels of the three sets, int64. Validation and test examples
            are the same where `num_val` is 0.

        Raises:
            ValueError: If more examples are asked for than there are.
        """
        pool, labels = relabelled(pool_y, self.classes)
        size = len(pool)
        num_val = min(size // 10, 10_000) if self.num_val is None else self.num_val
        left = size - num_val
        num_train = left if self.num_train is None else self.num_train
        if num_train > left or left == 0:
            raise ValueError(
                f"num_train {num_train} is more than the {max(left, 0)} examples that "
                f"num_val {num_val} leaves of {size}"
            )
        test, test_labels = relabelled(test_y, self.classes)
        if self.num_test is not None and self.num_test > len(test):
            raise ValueError(
                f"num_test {self.num_test} is more than the {len(test)} test examples"
            )
        test, test_labels = test[: self.num_test], test_labels[: self.num_test]
        order = torch.from_numpy(stream("split", self.seed).permutation(size))
        val, train = order[:num_val], order[num_val : num_val + num_train]
        train_labels = flipped_labels(
            labels[train], self.label_noise, self.num_classes, self.seed
        )
        if num_val == 0:
            return [pool[train], test, test], [train_labels, test_labels, test_labels]
        return (
            [pool[train], pool[val], test],
            [train_labels, labels[val], test_labels],
        )


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

"""What all DataModules share: loaders that resume and share out exactly."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_resnorm.data.loaders import BatchDataset, Loader, ResumableLoader
from lit_resnorm.data.sampling import EpochSampler, EvalBatchSampler, SkipBatchSampler


def check_at_least(least: int, **options: int | None) -> None:
    """Raise ValueError for the first option that is given and too small."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


class DataModule(LightningDataModule, ABC):
    """Three sets of examples, and loaders that resume and share out exactly.

    Training: every rank makes the same number of steps (`EpochSampler`), and the place
    in the epoch is in each checkpoint. Evaluation: each example counts once over all
    ranks, which make the same number of batches (`EvalBatchSampler`). Lightning's own
    distributed sampler isn't put in, whatever `use_distributed_sampler` says.
    `Trainer(overfit_batches=...)` takes the first training examples, in order.

    Args:
        batch_size: Examples a batch and process.
        num_workers: Processes that load data; 0 loads in this one, which is fastest for
            sets in memory.
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

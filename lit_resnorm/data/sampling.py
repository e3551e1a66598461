"""Batches that are the same after a resume: orders, shards and step seeds.

Everything random is a function of (seed, epoch, example) or (seed, rank, step), and
nothing is a function of what was drawn before. A run that goes on from a checkpoint
therefore needs only the place in its epoch, with any number of loader workers.
"""

import random
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def seed_sequence(name: str, *key: int) -> np.random.SeedSequence:
    """Return the seeds that belong to a purpose and a key.

    Args:
        name: What is drawn; different names give independent numbers.
        key: Non-negative integers such as seed, epoch and index.
    """
    # With its length, because numpy takes a key for the same with zeros appended.
    return np.random.SeedSequence([zlib.crc32(name.encode()), len(key), *key])


def stream(name: str, *key: int) -> np.random.Generator:
    """Return the random generator of `seed_sequence(name, *key)`."""
    return np.random.default_rng(seed_sequence(name, *key))


class BatchKey(NamedTuple):
    """What a dataset needs to make one batch: the epoch and the examples' indices."""

    epoch: int
    indices: np.ndarray


class EpochSampler:
    """One rank's share of a random order that depends on seed and epoch alone.

    Rank `r` of `world` takes every `world`-th example of the epoch's order, from the
    `r`-th on. Every rank takes equally many, so that all make the same number of steps:
    up to `world - 1` examples sit out an epoch, other ones in each epoch.

    Args:
        size: Number of examples of the training set.
        seed: Seed of the orders.
        rank: This process's rank.
        world: Number of processes.
        shuffle: Whether epochs have a random order; else the order of the set.

    Raises:
        ValueError: If there are fewer examples than processes.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        if size < world:
            raise ValueError(f"num_train: {size} examples can't feed {world} processes")
        self.size, self.seed, self.rank, self.world = size, seed, rank, world
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Return this rank's indices in the order of `epoch`, int64, shape `(len,)`."""
        if self.shuffle:
            order_N = stream("order", self.seed, epoch).permutation(self.size)
        else:
            order_N = np.arange(self.size)
        return order_N[self.rank :: self.world][: len(self)]

    def __len__(self) -> int:
        return self.size // self.world


class SkipBatchSampler:
    """Cuts an `EpochSampler`'s order into batches; iteration begins at batch `start`.

    A last batch that isn't full is kept unless `drop_last`. If it holds one example it
    is left out, because batch norm can't train on it; it stays where it is all there
    is, or where `batch_size` is 1.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, *, drop_last: bool = False
    ) -> None:
        if drop_last and len(sampler) < batch_size:
            raise ValueError(
                f"batch_size {batch_size} with drop_last leaves no batch of the "
                f"{len(sampler)} examples a process has"
            )
        self.sampler, self.batch_size = sampler, batch_size
        self.start = 0
        full, rest = divmod(len(sampler), batch_size)
        keep = full == 0 or (rest > 1 and not drop_last)
        self._length = full + keep
        self._latest: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the indices of each batch of `epoch`, from the first batch on."""
        if self._latest[0] == epoch:
            return self._latest[1]
        order_N, size = self.sampler.order(epoch), self.batch_size
        batches = [order_N[i * size : (i + 1) * size] for i in range(len(self))]
        self._latest = epoch, batches
        return batches

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, start = self.sampler.epoch, self.start
        for indices in self.batches(epoch)[start:]:
            yield BatchKey(epoch, indices)


class EvalBatchSampler:
    """One rank's share of a set in its own order; each example is in it exactly once.

    Rank `r` of `world` takes every `world`-th example from the `r`-th on, so shares
    differ by at most one. Each is cut as evenly as can be into the same number of
    batches on every rank: an unequal number would hang the ranks that wait in
    collectives (the buffers that DDP sends around, a probe's sums).
    With more than one process and a batch size of 1, a batch may hold two examples.

    Raises:
        ValueError: If there are fewer examples than processes.
    """

    def __init__(
        self, size: int, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if size < world:
            raise ValueError(
                f"an evaluation set of {size} examples can't be shared by {world} "
                "processes: use a larger num_val or num_test, or fewer devices"
            )
        self.batch_size = batch_size
        largest, smallest = -(-size // world), size // world
        self._length = min(-(-largest // batch_size), smallest)
        self._indices = np.arange(rank, size, world)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[BatchKey]:
        for indices in np.array_split(self._indices, self._length):
            yield BatchKey(0, indices)


class StepSeed(Callback):
    """Seeds torch, numpy and random before each batch, so dropout & co resume exactly.

    The seed is a function of (seed, rank, batches trained so far): nothing has to be
    saved, and what other code draws between two batches changes nothing in training.

    Args:
        seed: Non-negative seed of the run.

    Raises:
        ValueError: If the seed is negative.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.seed = seed

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Seed the global generators for this batch on this rank."""
        key = (self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)
        seeds = seed_sequence("step", *key).generate_state(3).tolist()
        torch_seed, numpy_seed, python_seed = seeds
        if trainer.strategy.root_device.type == "cpu":
            # torch.manual_seed also notes, with a stack trace, what idle devices shall
            # be seeded with: five times the time of all the rest here.
            torch.default_generator.manual_seed(torch_seed)
        else:
            torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)  # noqa: NPY002
        random.seed(python_seed)

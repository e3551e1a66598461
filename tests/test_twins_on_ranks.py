"""Twins of runs on two ranks, against separate training on two ranks."""

from functools import partial

import lightning as L
import pytest
import torch
from small import quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from twin_runs import EXACT, Experts, Net, data, largest_difference, made

from lit_resnorm_callbacks import StabilityProbe

REMOVED = [3, 17]
WEIGHTS = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)


def lists_of_ranks(num_steps=8, sizes=(6, 6), seed=0):
    """For each rank its batches; each step takes other examples."""
    generator = torch.Generator().manual_seed(seed)
    steps = [
        torch.randperm(48, generator=generator)[: sum(sizes)].split(sizes)
        for _ in range(num_steps)
    ]
    return [[step[rank].tolist() for step in steps] for rank in range(2)]


class OnRanks(Net):
    """Each rank takes batches of its own.

    Without an example the others count as in the run, made to add up to 1 again.
    """

    optimizer = staticmethod(partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    lists = lists_of_ranks()
    without: int | None = None
    class_weights = torch.ones(3, dtype=torch.float64)

    def train_dataloader(self):
        train = TensorDataset(*data().tensors, torch.arange(48))
        return DataLoader(train, batch_sampler=self.lists[self.global_rank])

    def val_dataloader(self):
        return DataLoader(data(20), 20)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        if self.without is None:
            return F.cross_entropy(self(x), y, self.class_weights)
        counts = []
        for lists in self.lists:
            rows = torch.tensor(lists[batch_idx])
            weights = self.class_weights[data().tensors[1][rows]]
            counts.append(weights / 2 / weights.sum() * (rows != self.without))
        left = sum(count.sum() for count in counts)
        losses = F.cross_entropy(self(x), y, reduction="none")
        # DDP halves the sum of both ranks' gradients.
        return 2 * (counts[self.global_rank] / left) @ losses


class ExpertsOnRanks(OnRanks, Experts):
    """Experts, of which one may get no rows on one rank, or on both."""

    optimizer = staticmethod(partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    lists = lists_of_ranks(10, (2, 2))

    def training_step(self, batch, batch_idx):
        if self.without is None:
            return super().training_step(batch, batch_idx)
        # An expert without rows has no gradient, so the row must not be in the pass.
        x, y, index = batch
        keep = index != self.without
        lists = [
            [i for i in rank[batch_idx] if i != self.without] for rank in self.lists
        ]
        left = sum(map(len, lists))
        return 2 * F.cross_entropy(self(x[keep]), y[keep], reduction="sum") / left


class Uneven(OnRanks):
    lists = lists_of_ranks(sizes=(8, 3))


class Weighted(OnRanks):
    class_weights = WEIGHTS


class NeverZeroed(OnRanks):
    """Gradients add up over the run."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=1e-3))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class ZeroedInPlace(OnRanks):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class Summed(OnRanks):
    """The loss is the sum over each rank's batch, averaged over ranks."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=1e-3))

    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(reduction="sum")

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        losses = F.cross_entropy(self(x), y, reduction="none")
        return losses[index != self.without].sum() if self.without else losses.sum()


class Saved(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.path}.{trainer.global_rank}.pt")


class SavedTwins(StabilityProbe):
    path = ""

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        states = [self.twin_state_dict(k) for k in range(len(REMOVED))]
        torch.save(states, f"{self.path}.{trainer.global_rank}.pt")


def run(module, callbacks, path, **options):
    trainer = quiet_trainer(
        max_epochs=2,
        devices=2,
        strategy="ddp_fork_find_unused_parameters_true",
        use_distributed_sampler=False,
        callbacks=callbacks,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module)
    return [torch.load(f"{path}.{rank}.pt") for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OnRanks, {}),
        (Uneven, {}),
        (Weighted, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (OnRanks, {"accumulate_grad_batches": 3}),
                (ExpertsOnRanks, {}),
                (Summed, {}),
                (NeverZeroed, {}),
                (NeverZeroed, {"gradient_clip_val": 0.1}),
                (ZeroedInPlace, {"gradient_clip_val": 0.1}),
            )
        ),
    ],
)
def test_twins_equal_separate_training_on_as_many_ranks(tmp_path, kind, options):
    loss_fn = nn.CrossEntropyLoss(WEIGHTS) if kind is Weighted else None
    batch = tuple(data(8).tensors)
    probe = SavedTwins(removed=REMOVED, strict=True, loss_fn=loss_fn, batch=batch)
    probe.path = tmp_path / "twins"
    ranks = run(made(kind)(), [probe], probe.path, **options)
    for k, index in enumerate(REMOVED):
        alone = made(kind)()
        alone.without = index
        path = tmp_path / "alone"
        expected = run(alone, [Saved(path)], path, **options)
        for twins, separate in zip(ranks, expected, strict=True):
            assert largest_difference(twins[k], separate) < EXACT

"""Orders, shards and loaders: which examples go where, on one process and on two."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from lit_resnorm.data import Digits, Gaussian
from lit_resnorm.data.loaders import ResumableLoader
from lit_resnorm.data.sampling import (
    EpochSampler,
    EvalBatchSampler,
    SkipBatchSampler,
    StepSeed,
    stream,
)


def test_streams_of_other_names_and_keys_are_other_numbers():
    keys = [("a", 1, 2), ("b", 1, 2), ("a", 2, 1), ("a", 1), ("a", 1, 2, 0)]
    drawn = [stream(*key).integers(2**63) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert stream("a", 1, 2).integers(2**63) == drawn[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_train_on_equally_many_different_examples(world):
    samplers = [EpochSampler(20, 7, rank=rank, world=world) for rank in range(world)]
    for epoch in range(3):
        orders = [sampler.order(epoch).tolist() for sampler in samplers]
        assert [len(order) for order in orders] == [20 // world] * world
        seen = [index for order in orders for index in order]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(20))


def test_other_examples_sit_out_in_other_epochs():
    left_out = set()
    for epoch in range(40):
        seen = [EpochSampler(5, 0, rank=rank, world=2).order(epoch) for rank in (0, 1)]
        left_out |= set(range(5)) - set(np.concatenate(seen).tolist())
    # Each sits out with probability 1/5 an epoch: 40 epochs miss one of five examples
    # with probability 7e-4.
    assert left_out == set(range(5))


def test_an_order_depends_on_seed_and_epoch():
    orders = {
        tuple(EpochSampler(30, seed).order(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert EpochSampler(4, 0, shuffle=False).order(9).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("size", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (9, 4, False, [4, 4]),
        (1, 4, False, [1]),
        (3, 1, False, [1, 1, 1]),
        (8, 4, False, [4, 4]),
    ],
)
def test_a_last_batch_of_one_example_is_left_out(size, batch_size, drop_last, sizes):
    batches = SkipBatchSampler(EpochSampler(size, 0), batch_size, drop_last=drop_last)
    assert [len(key.indices) for key in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("size", [4, 9, 16, 17, 33])
def test_evaluation_shares_are_exact_and_of_equally_many_batches(
    size, batch_size, world
):
    samplers = [
        EvalBatchSampler(size, batch_size, rank=rank, world=world)
        for rank in range(world)
    ]
    batches = [[key.indices.tolist() for key in sampler] for sampler in samplers]
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert len(samplers[0]) == len(batches[0])
    sizes = [len(batch) for of_rank in batches for batch in of_rank]
    assert min(sizes) >= 1
    assert max(sizes) <= (max(batch_size, 2) if world > 1 else batch_size)
    seen = sorted(i for of_rank in batches for batch in of_rank for i in batch)
    assert seen == list(range(size))


def test_more_processes_than_examples_are_refused():
    with pytest.raises(ValueError, match="num_train: 2 examples can't feed 3"):
        EpochSampler(2, 0, rank=0, world=3)
    with pytest.raises(ValueError, match="of 2 examples can't be shared by 3"):
        EvalBatchSampler(2, 8, rank=0, world=3)
    with pytest.raises(ValueError, match="batch_size 8 with drop_last leaves no batch"):
        SkipBatchSampler(EpochSampler(4, 0), 8, drop_last=True)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        StepSeed(-1)


def loader_of(size=20, batch_size=6, **options):
    data = Gaussian(
        num_train=size, batch_size=batch_size, dim=3, with_index=True, **options
    )
    data.setup()
    return data.train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_tells_which_examples_its_latest_batch_holds(num_workers):
    loader = loader_of(num_workers=num_workers)
    with pytest.raises(ValueError, match="no batch of this epoch"):
        loader.batch_indices()
    for epoch in (3, 4):
        loader.set_epoch(epoch)
        for _, _, index in loader:
            assert loader.batch_indices().tolist() == index.tolist()


def test_a_loaded_place_is_gone_on_from_once():
    loader, resumed = loader_of(), loader_of()
    loader.set_epoch(2)
    expected = [index.tolist() for _, _, index in loader]
    for number, _ in enumerate(loader, start=1):
        if number == 2:
            break
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(2)
    assert [index.tolist() for _, _, index in resumed] == expected[2:]
    assert [index.tolist() for _, _, index in resumed] == expected


def test_a_place_of_another_epoch_is_none_of_this_one():
    loader = loader_of()
    loader.load_state_dict({"epoch": 1, "done": 2, "total": len(loader)})
    loader.set_epoch(2)
    assert sum(1 for _ in loader) == len(loader)


def test_overfitting_takes_the_first_examples_in_order(tmp_path):
    data = Gaussian(batch_size=5, dim=4, with_index=True)
    seen = Seen()
    quiet_trainer(tmp_path, seen, max_epochs=2, overfit_batches=2).fit(Net(4), data)
    assert seen.rows["train"] == [list(range(5)), list(range(5, 10))] * 2


class Net(LightningModule):
    """Batch norm, whose buffers DDP sends around in each forward pass."""

    def __init__(self, features):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(features), nn.Linear(features, 10)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def test_step(self, batch, batch_idx):
        self.net(batch[0])

    def predict_step(self, batch, batch_idx):
        return batch[2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    """Keeps the indices of each batch; under DDP gathers them over the ranks."""

    def __init__(self):
        self.rows = {"train": [], "val": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows["train"].append(batch[2].tolist())

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ):
        self.rows["val"].append(batch[2].tolist())

    def on_train_end(self, trainer, pl_module):
        for kind, rows in self.rows.items():
            counts = torch.zeros(200)
            for row in rows:
                counts.index_add_(0, torch.tensor(row), torch.ones(len(row)))
            total = trainer.strategy.reduce(counts, reduce_op="sum")
            trainer.callback_metrics[f"{kind}/counts"] = total
            trainer.callback_metrics[f"{kind}/batches"] = torch.tensor(len(rows))


def quiet_trainer(folder, *callbacks, **options):
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )


@pytest.mark.ddp
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ranks_share_out_both_sets_whatever_the_trainer_is_told(
    tmp_path, use_distributed_sampler
):
    data = Digits(num_train=41, num_val=33, batch_size=16, with_index=True)
    trainer = quiet_trainer(
        tmp_path,
        Seen(),
        strategy="ddp_fork",
        devices=2,
        max_epochs=1,
        use_distributed_sampler=use_distributed_sampler,
    )
    trainer.fit(Net(64), data)
    metrics = trainer.callback_metrics
    trained, validated = metrics["train/counts"], metrics["val/counts"]
    assert trained.sum() == 40
    assert trained.max() == 1
    assert validated[:33].tolist() == [1] * 33
    assert validated.sum() == 33
    assert metrics["train/batches"] == 2
    assert metrics["val/batches"] == 2


def test_prediction_goes_over_the_test_set_in_order(tmp_path):
    data = Gaussian(num_test=30, batch_size=8, dim=4, with_index=True)
    module = Net(4)
    trainer = quiet_trainer(tmp_path, devices=1)
    predicted = trainer.predict(module, data)
    assert torch.cat(predicted).tolist() == list(range(30))
    trainer.test(module, data, verbose=False)
    assert isinstance(data.train_dataloader(), ResumableLoader)


class Drawn(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002


@pytest.mark.parametrize("disturbed", [False, True])
def test_step_seeds_fix_the_three_generators_of_each_step(tmp_path, disturbed):
    def values(seed, state):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002
        random.seed(state)
        drawn = Drawn()
        trainer = quiet_trainer(tmp_path, StepSeed(seed), drawn, max_epochs=2)
        trainer.fit(Net(4), Gaussian(num_train=12, batch_size=6, dim=4))
        return drawn.values

    once = values(1, 0)
    assert len({value for step in once for value in step}) == 12
    assert (values(2, 0) == once) is False
    assert values(1, 99 if disturbed else 0) == once

"""Batches whose rows are not their examples are told from those whose are."""

import lightning as L
import pytest
import torch
from small import quiet_trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from twin_runs import Net, data, largest_difference, made

from lit_resnorm_callbacks import StabilityProbe


def ordered(rows):
    return default_collate(sorted(rows, key=lambda row: float(row[0][0])))


def backwards(rows):
    return default_collate(rows[::-1])


def mixed(rows):
    x, y = default_collate(rows)
    return x.lerp(x.roll(1, 0), 0.3), y


def standardised(rows):
    x, y = default_collate(rows)
    return x - x.mean(0), y


def shuffled(rows):
    x, y = default_collate(rows)
    order = torch.randperm(len(x))
    return x[order], y[order]


def randomly_mixed(rows):
    x, y = default_collate(rows)
    return x.lerp(x[torch.randperm(len(x))], torch.rand(())), y


def only_pairs(rows):
    if len(rows) < 2:
        raise IndexError("pairs")
    return default_collate(rows)


def padded(rows):
    x, y = zip(*rows, strict=True)
    longest = max(int(each[0].abs() * 4) + 4 for each in x)
    cut = [each[: int(each[0].abs() * 4) + 4] for each in x]
    filled = [F.pad(each, (0, 16 - len(each))) for each in cut]
    return torch.stack(filled)[:, : max(longest, 16)], torch.stack(y)


def noisy(rows):
    x, y = default_collate(rows)
    return x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize(
    "collate",
    [ordered, backwards, mixed, standardised, shuffled, randomly_mixed, only_pairs],
)
def test_collate_functions_whose_rows_are_not_the_examples_are_refused(collate):
    trainer = quiet_trainer(max_epochs=1, callbacks=[StabilityProbe(removed=[3])])
    loaders = DataLoader(data(), 12, collate_fn=collate), DataLoader(data(20), 20)
    with pytest.raises(
        ValueError, match=rf"stability: .*collate_fn {collate.__name__}"
    ):
        trainer.fit(made(Net)(), *loaders)
    assert trainer.global_step == 0


def test_a_collate_function_in_workers_is_refused_too():
    trainer = quiet_trainer(max_epochs=1, callbacks=[StabilityProbe(removed=[3])])
    train = DataLoader(data(), 12, collate_fn=ordered, num_workers=2)
    with pytest.raises(ValueError, match=r"stability: .*collate_fn ordered"):
        trainer.fit(made(Net)(), train, DataLoader(data(20), 20))


@pytest.mark.parametrize("collate", [padded, noisy])
def test_collate_functions_that_pad_or_augment_each_row_work(collate):
    def run(*probes):
        L.seed_everything(7, verbose=False)
        module = made(Net)()
        trainer = quiet_trainer(max_epochs=2, callbacks=[*probes])
        loader = DataLoader(data(), 12, collate_fn=collate, shuffle=True)
        trainer.fit(module, loader, DataLoader(data(20), 20))
        assert loader.collate_fn is collate
        return module.state_dict()

    probe = StabilityProbe(removed=[3, 17], strict=True)
    assert largest_difference(run(probe), run()) == 0
    assert largest_difference(probe.twin_state_dict(0), probe.twin_state_dict(1)) > 0

"""Reading the probe batch leaves loaders, samplers, datasets and lazy layers alone."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from small import FunctionalNet, quiet_trainer, vectors
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, random_split

from lit_resnorm_callbacks import ActivationRateMonitor, StabilityProbe
from lit_resnorm_callbacks.probe.batch import first_examples


class Augmented(Dataset):
    """Draws from generators of its own, counts, and keeps what was read."""

    def __init__(self):
        self.data, self.count, self.cache = vectors(), 0, {}
        self.torch, self.numpy = torch.Generator(), np.random.default_rng(0)
        self.old, self.python = np.random.RandomState(0), random.Random(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.count += 1
        self.cache[index] = self.count
        x, y = self.data[index]
        noise = self.numpy.random() + self.old.rand() + self.python.random()
        noise += torch.rand((), generator=self.torch).item() + self.count
        return x + 0.01 * noise, y


def shared_generator():
    g = torch.Generator().manual_seed(1)
    train = DataLoader(vectors(), 8, shuffle=True, generator=g)
    return train, DataLoader(vectors(seed=1), 8, generator=g)


def shared_sampler_generator():
    g, data = torch.Generator().manual_seed(1), vectors()
    return (DataLoader(data, 8, sampler=RandomSampler(data, generator=g)),) * 2


def shared_dataset():
    train, val = random_split(Augmented(), [40, 24], torch.Generator().manual_seed(1))
    return DataLoader(train, 8, shuffle=True), DataLoader(val, 8)


class Counting:
    """A batch sampler with an order of its own, shared by the loaders."""

    def __init__(self):
        self.rounds = [0]

    def __len__(self):
        return 8

    def __iter__(self):
        self.rounds[0] += 1
        order = np.random.default_rng(self.rounds[0]).permutation(64).tolist()
        return iter([order[at : at + 8] for at in range(0, 64, 8)])


def shared_batch_sampler():
    sampler = Counting()
    train = DataLoader(vectors(), batch_sampler=sampler)
    return train, DataLoader(vectors(seed=1), batch_sampler=sampler)


LOADERS = [
    *(shared_generator, shared_sampler_generator),
    *(shared_dataset, shared_batch_sampler),
]


def trained(make, probes, kind=FunctionalNet):
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(max_epochs=2, callbacks=probes, num_sanity_val_steps=0)
    module = kind()
    trainer.fit(module, *make())
    return module.state_dict(), trainer


# A sampler with a generator is one that shuffles, for validation too.
@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize(
    ("probe", "make"),
    [
        *((ActivationRateMonitor, make) for make in LOADERS),
        # twins need to know the indices of a batch
        *(
            (StabilityProbe, make)
            for make in LOADERS
            if make is not shared_batch_sampler
        ),
    ],
)
def test_loaders_that_share_their_state_train_as_without_a_probe(probe, make):
    bare, _ = trained(make, [])
    probed, _ = trained(make, [probe(cadence=3, num_examples=12)])
    assert all(torch.equal(value, bare[name]) for name, value in probed.items())


@pytest.mark.parametrize("make", LOADERS)
def test_a_loader_with_generators_of_its_own_gives_the_same_examples_each_time(make):
    _, loader = make()
    first, second = (first_examples(loader, 12, "probe") for _ in range(2))
    assert len([*loader]) == len(loader)  # the run reads on
    third = first_examples(loader, 12, "probe")
    if make is shared_batch_sampler:  # its order follows from its own count
        third = second
    for other in (second, third):
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("probe", [ActivationRateMonitor, StabilityProbe])
def test_a_validation_loader_whose_workers_stay_is_read(probe):
    def trained(probes):
        L.seed_everything(7, verbose=False)
        train = DataLoader(vectors(), 8, shuffle=True)
        workers = {"num_workers": 1, "persistent_workers": True}
        # The sanity check of validation starts them.
        trainer, module = quiet_trainer(max_epochs=2, callbacks=probes), FunctionalNet()
        trainer.fit(module, train, DataLoader(vectors(seed=1), 8, **workers))
        return module.state_dict()

    bare, probed = trained([]), trained([probe(cadence=3, num_examples=12)])
    assert all(torch.equal(value, bare[name]) for name, value in probed.items())


class Lazy(FunctionalNet):
    """A net whose weights are drawn in its first pass."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.LazyLinear(16), nn.LazyLinear(3)


def plain():
    return DataLoader(vectors(), 8, shuffle=True), DataLoader(vectors(seed=1), 8)


def test_lazy_layers_get_the_values_that_they_have_without_a_probe():
    bare, _ = trained(plain, [], Lazy)
    probed, trainer = trained(plain, [ActivationRateMonitor(cadence=3)], Lazy)
    assert all(torch.equal(value, bare[name]) for name, value in probed.items())
    assert any(key.startswith("activation/") for key in trainer.callback_metrics)


def test_twins_of_lazy_layers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"first\.weight, first\.bias, head\.weight"):
        trained(plain, [StabilityProbe()], Lazy)

"""Where the probe batch comes from, and how batches are put together."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from small import FunctionalNet, quiet_trainer, vectors
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from lit_resnorm.measures.passes.batches import joined
from lit_resnorm_callbacks import ActivationRateMonitor, Cadence
from lit_resnorm_callbacks.probe.batch import first_examples


class Named(Dataset):
    """Examples with a file name and a list of tags each."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        x, y = vectors(20, seed=2)[index]
        return {"x": x, "y": y, "name": f"{index}.png", "tags": ("a", "b")}


class Net(FunctionalNet):
    """Takes dicts."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def forward(self, x):
        return super().forward(x)


def test_names_of_files_and_a_ragged_last_batch_are_joined():
    loader = DataLoader(Named(), 8)
    whole = joined([*loader])
    (other,) = DataLoader(Named(), 20)
    assert whole["name"] == [f"{i}.png" for i in range(20)]
    torch.testing.assert_close(whole["x"], other["x"], rtol=0, atol=0)
    probe = ActivationRateMonitor(num_examples=20, strict=True)
    trainer = quiet_trainer(max_steps=2, callbacks=[probe])
    trainer.fit(Net(), loader, loader)
    assert trainer.callback_metrics["activation/rate_mean"] > 0


def test_joined_keeps_kinds_and_what_the_examples_share():
    pairs = [(torch.ones(n, 2), [torch.zeros(n), torch.tensor(3.0)], 7) for n in (2, 1)]
    whole = joined(pairs)
    assert isinstance(whole, tuple)
    assert whole[0].shape == (3, 2)
    assert whole[1][0].shape == (3,)
    assert whole[1][1] == 3  # nobody's
    assert whole[2] == 7


def test_of_combined_loaders_the_first_is_taken():
    first, second = (DataLoader(Named(), 8), DataLoader(Named(), 4))
    combined = CombinedLoader({"a": first, "b": second}, "sequential")
    probe = ActivationRateMonitor(num_examples=20, strict=True)
    trainer = quiet_trainer(max_steps=2, callbacks=[probe])
    trainer.fit(Net(), DataLoader(Named(), 8), combined)
    assert trainer.callback_metrics["activation/rate_mean"] > 0


def test_evaluations_of_the_same_weights_on_other_data_are_measured_each():
    probe = ActivationRateMonitor()
    trainer = quiet_trainer(callbacks=[probe])
    L.seed_everything(0, verbose=False)
    net, found = FunctionalNet(), []
    for seed in (0, 0, 1):
        trainer.validate(net, DataLoader(vectors(20, seed=seed), 20), verbose=False)
        found.append(float(trainer.callback_metrics["activation/rate_mean"]))
    assert found[0] == found[1] != found[2]


def test_a_batch_without_examples_is_refused_before_training():
    probe = ActivationRateMonitor(batch=(torch.empty(0, 8), torch.empty(0)))
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    loader = DataLoader(vectors(8), 4)
    with pytest.raises(ValueError, match="activation: the probe batch holds no"):
        trainer.fit(FunctionalNet(), loader, loader)


class ThreeSteps(FunctionalNet):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(3):
            self.optimizers().step()


def test_batches_of_several_steps_pass_over_no_measurement():
    steps = []

    class Noting(ActivationRateMonitor):
        def run(self, trainer, module, step):
            steps.append(step)
            super().run(trainer, module, step)

    trainer = quiet_trainer(
        max_epochs=1, callbacks=[Noting(cadence={"every_n_steps": 10})]
    )
    loader = DataLoader(vectors(48), 4)
    trainer.fit(ThreeSteps(), loader, loader)
    assert steps == [0, 12, 21, 30, 36]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cadence": 0}, "cadence is 0; it must be at least 1"),
        ({"cadence": 2.5}, "cadence is 2.5; it must be a whole number"),
        ({"cadence": {"every": 5}}, "cadence has every; it knows every_n_steps, at_st"),
        ({"num_examples": 2.5}, "num_examples is 2.5; it must be a whole number"),
        ({"sites": "("}, r"sites is '\(', which is no regular expression"),
    ],
)
def test_options_that_can_not_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationRateMonitor(**options)


def test_a_cadence_may_be_given_by_its_attributes():
    given = ActivationRateMonitor(cadence={"every_n_steps": 5, "at_end": False}).cadence
    assert given == Cadence(5, at_end=False)


class Once:
    """A validation loader that can be read once."""

    def __init__(self):
        self.left = iter(DataLoader(vectors(20), 4))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


def test_a_loader_that_can_be_read_once_is_left_to_the_validation():
    trainer = quiet_trainer(max_steps=1, callbacks=[ActivationRateMonitor()])
    with pytest.raises(ValueError, match="activation: the validation loader is a Once"):
        trainer.fit(FunctionalNet(), DataLoader(vectors(8), 4), Once())


def test_samplers_of_whole_batches_are_read_without_workers_too():
    batches = BatchSampler(SequentialSampler(vectors(20)), 8, drop_last=False)
    loader = DataLoader(vectors(20), batch_size=None, sampler=batches, num_workers=1)
    batch = first_examples(loader, 20, "activation")
    assert batch[0].shape == (20, 8)

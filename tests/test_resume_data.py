"""A run that goes on from a checkpoint ends with the bits of the unbroken one."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lit_resnorm.data import Digits
from lit_resnorm.data.sampling import StepSeed

NUM_TRAIN, BATCH_SIZE, EPOCHS = 100, 16, 3
# Six full batches; the last one has four examples.
STEPS_PER_EPOCH = 7


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, 10),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fitted(folder, *, ckpt_path=None, num_workers=0, callbacks=(), **options):
    """Train on augmented digits; return weights and buffers."""
    torch.manual_seed(0 if ckpt_path is None else 1)
    module = Net()
    data = Digits(
        num_train=NUM_TRAIN,
        num_val=33,
        batch_size=BATCH_SIZE,
        augment=True,
        num_workers=num_workers,
        seed=5,
    )
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "num_sanity_val_steps": 0,
            "callbacks": [StepSeed(5), *callbacks],
            **options,
        }
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.state_dict()


def each_step(folder):
    return ModelCheckpoint(
        folder / "steps", "{step}", save_top_k=-1, every_n_train_steps=1
    )


def assert_same(resumed, unbroken):
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def batches_trained(state_dict):
    return int(state_dict["net.2.num_batches_tracked"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The unbroken run, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fitted(folder, callbacks=[each_step(folder)])


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="mid-epoch"),
        pytest.param(STEPS_PER_EPOCH, id="last batch of an epoch"),
        pytest.param(STEPS_PER_EPOCH + 1, id="first batch of an epoch"),
        pytest.param(3 * STEPS_PER_EPOCH - 1, id="one before the end"),
    ],
)
def test_resume_ends_with_the_bits_of_the_unbroken_run(unbroken, tmp_path, step):
    folder, expected = unbroken
    checkpoint = folder / "steps" / f"step={step}.ckpt"
    assert_same(fitted(tmp_path, ckpt_path=checkpoint), expected)


def test_workers_change_nothing_and_resume_exactly(unbroken, tmp_path):
    _, expected = unbroken
    steps = [each_step(tmp_path)]
    assert_same(fitted(tmp_path, num_workers=2, callbacks=steps), expected)
    checkpoint = tmp_path / "steps" / "step=10.ckpt"
    assert_same(fitted(tmp_path, ckpt_path=checkpoint, num_workers=2), expected)


def test_validation_changes_nothing_in_training(unbroken, tmp_path):
    _, expected = unbroken
    assert_same(fitted(tmp_path, limit_val_batches=0), expected)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resume_is_exact_with_accumulated_gradients(tmp_path, step):
    options = {"accumulate_grad_batches": 3}
    expected = fitted(tmp_path, callbacks=[each_step(tmp_path)], **options)
    assert batches_trained(expected) == EPOCHS * STEPS_PER_EPOCH
    checkpoint = tmp_path / "steps" / f"step={step}.ckpt"
    assert_same(fitted(tmp_path, ckpt_path=checkpoint, **options), expected)


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param({"monitor": "val/loss"}, id="at validation's end"),
        pytest.param({"save_on_train_epoch_end": True}, id="at the epoch's end"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole epochs"),
        # An epoch that is cut short doesn't go on after a resume.
        pytest.param({"limit_train_batches": 4}, id="limited epochs"),
        pytest.param(
            {"limit_train_batches": 4, "num_workers": 2},
            id="with workers",
            marks=pytest.mark.slow,
        ),
        pytest.param({"val_check_interval": 3}, id="validation amid the epoch"),
    ],
)
def test_resume_from_an_epochs_checkpoint_is_exact(tmp_path, checkpoint, options):
    saved = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, **checkpoint)
    expected = fitted(tmp_path, callbacks=[saved], **options)
    paths = sorted((tmp_path / "all").iterdir())
    assert len(paths) >= EPOCHS
    for path in paths[:2]:
        assert_same(fitted(tmp_path, ckpt_path=path, **options), expected)


def test_a_place_amid_an_epoch_of_another_length_is_an_error(unbroken, tmp_path):
    checkpoint = unbroken[0] / "steps" / "step=3.ckpt"
    data = Digits(num_train=NUM_TRAIN, batch_size=2 * BATCH_SIZE)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        max_epochs=EPOCHS,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match=r"epoch of 7 batches, .* have 4"):
        trainer.fit(Net(), data, ckpt_path=checkpoint)


DDP = {"strategy": "ddp_fork", "devices": 2}


@pytest.mark.ddp
@pytest.mark.parametrize("step", [2, 4])
def test_resume_on_two_ranks_is_exact(tmp_path, step):
    expected = fitted(tmp_path, callbacks=[each_step(tmp_path)], **DDP)
    assert batches_trained(expected) == EPOCHS * 4
    checkpoint = tmp_path / "steps" / f"step={step}.ckpt"
    resumed = fitted(tmp_path, ckpt_path=checkpoint, num_workers=2, **DDP)
    assert_same(resumed, expected)

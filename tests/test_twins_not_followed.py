"""What twins can't follow is refused before training, or ends them and not the run."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader
from twin_runs import REMOVED, Net, batches, data, fit, largest_difference, made

from lit_resnorm_callbacks import StabilityProbe


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.head.weight.register_hook(lambda grad: 2 * grad)


class Noisy(Net):
    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.add_(0.01)


class Penalised(Net):
    """A penalty whose value is zero and whose gradient isn't."""

    def training_step(self, batch, batch_idx):
        norm = self.head.weight.square().sum()
        return super().training_step(batch, batch_idx) + norm - norm.detach()


class Doubled(Net):
    def backward(self, loss):
        (2 * loss).backward()


class Scaled(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for p in pl_module.parameters():
            p.grad.mul_(0.5)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        (Hooked, []),
        (Noisy, []),
        (Penalised, []),
        (Doubled, []),
        (Net, [Scaled()]),
    ],
)
def test_gradients_that_something_else_changes_are_refused(kind, beside):
    probe = StabilityProbe(removed=REMOVED)
    with pytest.raises(ValueError, match=r"stability: .*with a gradient that differs"):
        fit(made(kind)(), batches(8), [*beside, probe])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradients_that_only_clipping_changes_are_taken(accumulate, clip):
    probe = StabilityProbe(removed=REMOVED, strict=True)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = fit(made(Net)(), batches(9), [probe], max_epochs=2, **options)
    assert trainer.callback_metrics["stability/distance"] > 0


class Clamped(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.head.weight.clamp_(-0.1, 0.1)


class MovingTeacher(Net):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(16, 3).requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + self.teacher(x)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.teacher.bias.data.lerp_(self.head.bias.data, 0.1)


class Swapped(Callback):
    """Averaged weights that stand in for the run's at its end."""

    def on_train_end(self, trainer, pl_module):
        for p in pl_module.parameters():
            p.data = p.data.mul(0.5)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        (Net, Clamped),
        (Net, partial(StochasticWeightAveraging, 1e-2, swa_epoch_start=1)),
        (Net, Swapped),
        (MovingTeacher, None),
    ],
)
def test_weights_that_something_else_changes_end_the_twins_and_not_the_run(
    kind, beside
):
    probe = StabilityProbe(removed=REMOVED)
    others = [] if beside is None else [beside()]
    with pytest.warns(UserWarning, match="other than its optimizer") as said:
        trainer = fit(made(kind)(), batches(8), [*others, probe], max_epochs=3)
    assert trainer.callback_metrics["stability/eps_hyp"].isnan()
    assert sum("other than its optimizer" in str(each.message) for each in said) == 1


def test_an_error_amid_the_run_ends_the_twins_and_not_the_run():
    class Failing(Net):
        def probe_forward(self, batch):
            if self.global_step >= 5 and self.training:
                raise KeyError("lost")
            return self(batch[0])

    with pytest.warns(UserWarning, match="twins stopped: KeyError"):
        trainer = fit(made(Failing)(), batches(12), [StabilityProbe(removed=REMOVED)])
    assert trainer.global_step == 12
    assert trainer.callback_metrics["stability/eps_hyp"].isnan()


def test_a_loss_that_changes_with_the_epoch_ends_the_twins():
    class Curriculum(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.head.weight.square().sum() * self.current_epoch

    with pytest.warns(UserWarning, match="twins stopped: .*training loss"):
        fit(
            made(Curriculum)(),
            batches(6),
            [StabilityProbe(removed=REMOVED)],
            max_epochs=2,
        )


class Hook(Net):
    """Changes batches on their way to the step."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.changed(*batch) if self.training else batch


class Mixed(Hook):
    """Mixup: each row has a share of another, drawn by torch."""

    def changed(self, x, y):
        share = torch.rand(())
        return share * x + (1 - share) * x[torch.randperm(len(x))], y


class Sorted(Hook):
    def changed(self, x, y):
        order = x[:, 0].argsort()
        return x[order], y[order]


class Reversed(Hook):
    def changed(self, x, y):
        return x.flip(0), y.flip(0)


class Centred(Hook):
    """Statistics of the batch."""

    def changed(self, x, y):
        return x - x.mean(0), y


class MixedBefore(Mixed):
    on_before_batch_transfer = Hook.on_after_batch_transfer
    on_after_batch_transfer = Net.on_after_batch_transfer


@pytest.mark.parametrize("kind", [Mixed, Sorted, Reversed, Centred, MixedBefore])
def test_hooks_that_mix_or_reorder_rows_are_refused(kind):
    with pytest.raises(ValueError, match=r"stability: on_\w+_batch_transfer mixes"):
        fit(made(kind)(), batches(8), [StabilityProbe(removed=REMOVED)])


class Noised(Hook):
    """Each row is changed by itself; the hook counts, and has a generator."""

    def __init__(self):
        super().__init__()
        self.num, self.generator = 0, torch.Generator().manual_seed(0)

    def changed(self, x, y):
        self.num += 1
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x.mul_(2) + 0.1 * noise + 0.1 * torch.randn_like(x), y


def test_hooks_that_change_rows_by_themselves_are_followed_and_left_alone():
    names = ("stability", "another")
    probes = [StabilityProbe(removed=REMOVED, strict=True, name=n) for n in names]
    probed = made(Noised)()
    trainer = fit(probed, batches(20), probes)
    assert trainer.callback_metrics["stability/distance"] > 0
    bare = made(Noised)()
    fit(bare, batches(20))
    assert largest_difference(probed.state_dict(), bare.state_dict()) == 0
    assert probed.num == bare.num == 20
    assert "on_after_batch_transfer" not in vars(probed)


class MixingData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), 8)

    def val_dataloader(self):
        return DataLoader(data(20), 20)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return 0.7 * x + 0.3 * x.roll(1, 0), y


def test_a_data_module_that_mixes_rows_is_refused():
    trainer = quiet_trainer(callbacks=[StabilityProbe(removed=REMOVED)], max_epochs=1)
    with pytest.raises(ValueError, match=r"stability: on_after_batch_transfer mixes"):
        trainer.fit(made(Net)(), datamodule=MixingData())


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
def test_averages_of_weights_are_refused_before_the_probe_and_followed_behind(kind):
    probe = StabilityProbe(removed=REMOVED, cadence=5)
    with pytest.raises(ValueError, match=rf"stability: {kind.__name__} .*move it"):
        fit(made(Net)(), batches(8), [kind(), probe])
    behind, alone = (StabilityProbe(removed=REMOVED, strict=True) for _ in range(2))
    averaged = fit(made(Net)(), batches(8), [behind, kind()], max_epochs=2)
    plain = fit(made(Net)(), batches(8), [alone], max_epochs=2)
    for name in ("eps_hyp", "distance", "generalization_gap"):
        key = f"stability/{name}"
        assert averaged.callback_metrics[key] == plain.callback_metrics[key]
    for k in range(len(REMOVED)):
        states = (each.twin_state_dict(k) for each in (behind, alone))
        trained = [
            {n: state[n] for n, _ in made(Net)().named_parameters()} for state in states
        ]
        assert largest_difference(*trained) == 0


def test_averages_are_not_compared_with_the_twins_of_what_was_trained(tmp_path):
    path = tmp_path / "averages.ckpt"

    class Saving(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(path)

    probes = [StabilityProbe(removed=REMOVED, cadence=2, strict=True) for _ in range(3)]
    averaging = [probes[0], Saving(), EMAWeightAveraging()]
    trainer = fit(made(Net)(), batches(8), averaging)
    loader = DataLoader(data(20), 20)
    says = pytest.warns(UserWarning, match="stability: the weights are averages")
    with says:
        trainer.validate(trainer.lightning_module, loader, verbose=False)
    other = quiet_trainer(callbacks=[probes[1]])
    with says:
        other.validate(made(Net)(), loader, ckpt_path=path, verbose=False)
    assert not any("stability" in key for key in other.callback_metrics)
    resumed = quiet_trainer(callbacks=[probes[2]], max_epochs=2)
    train = DataLoader(data(), batch_sampler=batches(8))
    with pytest.raises(ValueError, match="stability: the checkpoint holds averages"):
        resumed.fit(made(Net)(), train, ckpt_path=path)

"""What twins can't follow is refused before training, or ends them and not the run."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn
from twin_runs import REMOVED, Net, batches, fit, made

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

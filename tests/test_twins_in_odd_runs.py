"""Twins equal separate training in runs out of the ordinary, or are refused by name."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from small import quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from twin_runs import (
    EXACT,
    REMOVED,
    Experts,
    Net,
    adamw,
    batches,
    data,
    fit,
    largest_difference,
    made,
    twins_and_separate_runs,
    without,
)

from lit_resnorm_callbacks import StabilityProbe


def assert_equal_to_separate_runs(kind, lists=None, bound=EXACT, **options):
    lists = lists or batches(16)
    found = twins_and_separate_runs(made(kind), lists, **options)
    for twin, alone in zip(*found, strict=True):
        assert largest_difference(twin, alone) < bound
    assert largest_difference(found[0][0], found[0][1]) > 1e-6


@pytest.mark.parametrize("optimizer", [adamw, torch.optim.Adagrad, torch.optim.RMSprop])
def test_twins_forked_after_another_sat_out_a_step_have_their_own_state(optimizer):
    class Odd(Net):
        pass

    Odd.optimizer = staticmethod(optimizer)
    lists = [[i] for i in range(10)] * 2
    probe = StabilityProbe(removed=[1, 4, 7], strict=True)
    fit(made(Odd)(), lists, [probe])
    for k, index in enumerate([1, 4, 7]):
        alone = made(Odd)()
        fit(alone, [rows for rows in lists if rows != [index]])
        assert largest_difference(probe.twin_state_dict(k), alone.state_dict()) < EXACT


class Convolution(Net):
    """Weights in channels-last order, states of which lie otherwise in a stack."""

    optimizer = staticmethod(partial(torch.optim.Adam, lr=1e-2))

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Unflatten(1, (2, 2, 4)), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten()
        )
        self.head = nn.Linear(9, 3)
        self.to(memory_format=torch.channels_last)


def test_late_twins_of_channels_last_convolutions_have_their_own_state():
    lists = [[i] for i in range(8)] * 2
    probe = StabilityProbe(removed=[1, 4], strict=True)
    fit(made(Convolution)(), lists, [probe])
    for k, index in enumerate([1, 4]):
        alone = made(Convolution)()
        fit(alone, [rows for rows in lists if rows != [index]])
        assert largest_difference(probe.twin_state_dict(k), alone.state_dict()) < EXACT


class Skipping(Net):
    """A training step that gives no loss for some batches."""

    skipped = (2, 7)

    def training_step(self, batch, batch_idx):
        if batch_idx in self.skipped:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_batches_without_a_loss_give_twins_no_gradient(accumulate):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*training_step. returned .None")
        assert_equal_to_separate_runs(Skipping, accumulate_grad_batches=accumulate)


def test_an_incomplete_last_accumulation_is_a_step_of_twins_too():
    assert_equal_to_separate_runs(
        Net, batches(8, num=46), accumulate_grad_batches=3, max_epochs=2
    )


def test_accumulation_that_is_scheduled_is_followed():
    def schedule():
        return [GradientAccumulationScheduler({0: 1, 1: 4})]

    assert_equal_to_separate_runs(Net, batches(8), beside=schedule, max_epochs=2)


class ZeroedInPlace(Net):
    """Gradients become zero instead of none, so decay and momentum go on."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class NeverZeroed(Net):
    """Gradients add up over the run."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=1e-3))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class ZeroedAfterwards(Net):
    """Gradients are gone when the batch ends."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        optimizer.zero_grad()


class SkippedSteps(Net):
    """Each second batch's gradients are dropped without a step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class WarmedUp(Net):
    """The rate is set in the step itself."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.param_groups[0]["lr"] = 0.01 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize(
    "kind", [ZeroedInPlace, NeverZeroed, ZeroedAfterwards, SkippedSteps, WarmedUp]
)
def test_steps_and_zeroing_that_a_module_overrides_are_followed(kind):
    assert_equal_to_separate_runs(kind, batches(8), max_epochs=2)


class SkippedLayer(Experts):
    """A layer is used in some batches only, as with stochastic depth."""

    def forward(self, x):
        output = self.experts[0](x)
        return output + self.experts[1](x) if x[0, 0] > 0 else output


class OneOfTwoHeads(Experts):
    """Which head counts depends on the batch's labels."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        head = self.experts[1 if bool((y == 2).any()) else 2]
        return F.cross_entropy(head(x), y)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.8, dampening=0.3),
        partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        partial(torch.optim.NAdam, lr=1e-2),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_experts_without_gradient_are_left_alone_as_in_separate_runs(
    optimizer, accumulate
):
    class Odd(Experts):
        pass

    Odd.optimizer = staticmethod(optimizer)
    assert_equal_to_separate_runs(
        Odd, batches(30, size=3), accumulate_grad_batches=accumulate
    )


def test_layers_that_some_batches_skip_are_left_alone_as_in_separate_runs():
    lists = batches(24, size=3)
    probe = StabilityProbe(removed=REMOVED, strict=True)
    fit(made(SkippedLayer)(), lists, [probe])
    for k, index in enumerate(REMOVED):
        alone = made(SkippedLayer)()
        fit(alone, [rows for rows in without(index, lists) if rows])
        assert largest_difference(probe.twin_state_dict(k), alone.state_dict()) < EXACT


class Tied(Net):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.backbone = nn.Sequential(self.first, nn.Tanh(), self.second)
        self.head = nn.Linear(16, 3)


class TiedBuffers(Net):
    """One batch norm in two places."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(16)
        self.backbone = nn.Sequential(norm, nn.Linear(16, 16), norm, nn.Tanh())
        self.head = nn.Linear(16, 3)


@pytest.mark.parametrize("kind", [Tied, TiedBuffers])
def test_state_dict_of_a_twin_has_its_weights_under_every_name(kind):
    assert_equal_to_separate_runs(kind)
    probe, module = StabilityProbe(removed=[3], strict=True), made(kind)()
    fit(module, batches(8), [probe])
    state = probe.twin_state_dict(0)
    other = made(kind)()
    other.load_state_dict(state)
    assert largest_difference(other.state_dict(), state) == 0
    run = module.state_dict()
    trained = [*dict(module.named_parameters(remove_duplicate=False))]
    assert all(not torch.equal(state[name], run[name]) for name in trained)


class Unfrozen(Callback):
    """Freezes the backbone, and trains it from a batch on."""

    def __init__(self, batch, refreeze=None):
        self.batch, self.refreeze = batch, refreeze

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (self.batch, self.refreeze):
            pl_module.backbone.requires_grad_(batch_idx == self.batch)


class InGroups(Net):
    """The frozen part is in the optimizer from the start."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("refreeze", [None, 12])
def test_parameters_unfrozen_and_frozen_amid_a_run_are_followed(refreeze):
    def beside():
        return [Unfrozen(6, refreeze)]

    assert_equal_to_separate_runs(InGroups, beside=beside)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_groups_that_finetuning_adds_are_followed(optimizer):
    class Odd(Net):
        pass

    Odd.optimizer = staticmethod(partial(optimizer, lr=0.01))

    def beside():
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]

    assert_equal_to_separate_runs(Odd, batches(6), beside=beside, max_epochs=3)


class Restarted(Callback):
    """Replaces the optimizer amid the run."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 8:
            trainer.strategy.optimizers = [pl_module.configure_optimizers()]


def test_an_optimizer_that_is_replaced_begins_anew_for_twins_too():
    assert_equal_to_separate_runs(Net, beside=lambda: [Restarted()])


class Branching(Net):
    """A short cut where no number is masked, as in attention."""

    def forward(self, x):
        mask = x.abs() > 0.05
        return super().forward(x if mask.all() else x * mask)


class BranchingLate(Net):
    """A branch on a tensor that comes only amid the run."""

    passes = 0

    def training_step(self, batch, batch_idx):
        self.late = batch_idx >= 5
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        if getattr(self, "late", False) and bool(self.head.bias.sum() > 1e9):
            return super().forward(2 * x)
        return super().forward(x)


class ByLength(Net):
    """A slice as long as the batch's largest number."""

    def forward(self, x):
        num = int(x.abs().max().ceil().clamp(max=3))
        return super().forward(x) * num


class OnTheHost(Net):
    """A function that torch doesn't see."""

    def forward(self, x):
        scale = torch.from_numpy(x.detach().numpy().mean(1, keepdims=True))
        return super().forward(x * (1 + 0.1 * scale))


@pytest.mark.parametrize("kind", [Branching, BranchingLate, ByLength, OnTheHost])
def test_models_that_vmap_cannot_run_have_twins_one_by_one(kind):
    assert_equal_to_separate_runs(kind)


class Centred(Net):
    """A moving mean, in a buffer that each forward pass assigns anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head(h - self.mean)


class Counting(Net):
    """A buffer that counts batches and sets a temperature."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.num = self.num + 1
        return super().forward(x) / (1 + 0.1 * self.num)


class Written(Centred):
    """The same mean, written in place."""

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(h - self.mean)


@pytest.mark.parametrize("kind", [Centred, Counting, Written])
def test_buffers_that_a_pass_assigns_or_writes_are_each_twins_own(kind):
    assert_equal_to_separate_runs(kind)


class MeanAttribute(Net):
    """The moving mean once more, in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(12, dtype=torch.float64)

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head(h - self.mean)


class MeanInPlace(MeanAttribute):
    """A plain attribute that is written in place."""

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(h - self.mean)


class Hidden(Net):
    """A hidden state that appears in the first pass, and goes on to the next."""

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            h = h + 0.5 * getattr(self, "last", 0.0)
            self.last = h.detach().mean(0)
        return self.head(h)


class Remembering(Net):
    """A list of the last means, and a number of passes that sets a temperature."""

    def __init__(self):
        super().__init__()
        self.means, self.num = [], 0

    def forward(self, x):
        h = self.backbone(x)
        if self.training:
            self.num += 1
            self.means = [*self.means[-2:], h.detach().mean()]
        return self.head(h - sum(self.means)) / (1 + 0.1 * self.num)


@pytest.mark.parametrize("kind", [MeanAttribute, MeanInPlace, Hidden, Remembering])
def test_plain_attributes_that_a_pass_updates_are_each_twins_own(kind):
    assert_equal_to_separate_runs(kind)


def test_twins_with_states_of_their_own_go_on_from_a_checkpoint(tmp_path):
    lists = batches(12)
    whole = StabilityProbe(removed=REMOVED, strict=True)
    module = made(Hidden)()
    expected = fit(module, lists, [whole]).callback_metrics
    first = made(Hidden)()
    trainer = fit(first, lists[:7], [StabilityProbe(removed=REMOVED)])
    trainer.save_checkpoint(tmp_path / "amid.ckpt")
    rest = StabilityProbe(removed=REMOVED, strict=True)
    loader = DataLoader(data(), batch_sampler=lists[7:])
    second = made(Hidden)()
    second.last = first.last
    later = quiet_trainer(max_epochs=2, callbacks=[rest])
    later.fit(
        second, loader, DataLoader(data(20), 20), ckpt_path=tmp_path / "amid.ckpt"
    )
    for k in range(len(REMOVED)):
        state = whole.twin_state_dict(k)
        assert largest_difference(rest.twin_state_dict(k), state) < EXACT
    assert later.callback_metrics["stability/eps_hyp"] == pytest.approx(
        expected["stability/eps_hyp"].item(), rel=1e-9
    )


class AtEpochs(LearningRateFinder):
    """Searches a rate as two epochs begin, the second amid the run."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("how", ["callback", "milestone", "Tuner", "batch size"])
def test_searches_for_rate_and_batch_size_leave_the_probe_as_it_was(how, tmp_path):
    class Odd(Net):
        lr, batch_size = 0.1, 8

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

        def train_dataloader(self):
            return DataLoader(data(), self.batch_size)

        def val_dataloader(self):
            return DataLoader(data(20), 20)

    probe = StabilityProbe(num_twins=4, strict=True)
    finder = {
        "callback": [LearningRateFinder(num_training_steps=12)],
        "milestone": [AtEpochs(num_training_steps=12)],
        "batch size": [BatchSizeFinder(init_val=2, max_trials=2)],
    }
    trainer = quiet_trainer(
        max_epochs=2,
        callbacks=[*finder.get(how, []), probe],
        default_root_dir=tmp_path,
    )
    module = made(Odd)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "Tuner":
            Tuner(trainer).lr_find(module, num_training=12)
        trainer.fit(module)
    assert trainer.callback_metrics["stability/eps_hyp"] > 0
    assert "stability/failed" not in trainer.callback_metrics


def test_checkpoint_from_before_a_training_begins_twins_anew(tmp_path):
    probe = StabilityProbe(removed=REMOVED, strict=True)
    trainer = quiet_trainer(callbacks=[probe])
    module = made(Net)()
    trainer.validate(module, DataLoader(data(20), 20), verbose=False)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    again = StabilityProbe(removed=REMOVED, strict=True)
    later = quiet_trainer(max_epochs=1, callbacks=[again])
    later.fit(
        module,
        DataLoader(data(), 12),
        DataLoader(data(20), 20),
        ckpt_path=tmp_path / "before.ckpt",
    )
    assert later.callback_metrics["stability/distance"] > 0


def test_vectors_of_integers_have_twins():
    class Embedded(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 12), nn.Tanh()
            )

    tokens = torch.randint(9, (48, 4), generator=torch.Generator().manual_seed(0))
    train = TensorDataset(tokens, vectors(48).tensors[1])
    probe = StabilityProbe(
        removed=REMOVED, strict=True, batch=(tokens[:8], train.tensors[1][:8])
    )
    lists = batches(12)
    module = made(Embedded)()
    module.validation_step = lambda batch, batch_idx: None
    fit(module, lists, [probe], train=train, limit_val_batches=0)
    alone = made(Embedded)()
    fit(alone, without(3, lists), train=train, limit_val_batches=0)
    assert largest_difference(probe.twin_state_dict(0), alone.state_dict()) < EXACT

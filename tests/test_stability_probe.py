"""Twins equal separate runs on the data without their example."""

import re
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small import FunctionalNet, loaders, quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from twin_runs import (
    NETS,
    REMOVED,
    adam,
    adamw,
    batches,
    dampened,
    data,
    fit,
    largest_difference,
    nesterov,
    net,
    sgd,
    twins_and_separate_runs,
    without,
)

from lit_resnorm.data import Digits
from lit_resnorm.modules import LitMLP, LitResNetBN
from lit_resnorm_callbacks import StabilityProbe


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("optimizer", [sgd, adam, adamw])
def test_twins_over_200_steps_equal_separate_runs(kind, optimizer):
    twins, separate = twins_and_separate_runs(
        lambda: net(kind, optimizer), batches(200), gradient_clip_val=1.0
    )
    for twin, alone in zip(twins, separate, strict=True):
        assert largest_difference(twin, alone) < 1e-10
    assert largest_difference(*twins[:2]) > 1e-4


@pytest.mark.parametrize("optimizer", [nesterov, dampened, adam])
def test_twins_equal_separate_runs_under_accumulation_and_clipping_by_value(optimizer):
    twins, separate = twins_and_separate_runs(
        lambda: net("res2_bn", optimizer),
        batches(48),
        accumulate_grad_batches=3,
        gradient_clip_val=0.05,
        gradient_clip_algorithm="value",
    )
    for twin, alone in zip(twins, separate, strict=True):
        assert largest_difference(twin, alone) < 1e-10


def test_twins_follow_the_schedule_of_the_rate():
    def make():
        schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20)
        return net("mlp", sgd, lr_scheduler=schedule, lr_interval="step")

    for twin, alone in zip(*twins_and_separate_runs(make, batches(24)), strict=True):
        assert largest_difference(twin, alone) < 1e-10


def test_frozen_parameters_and_groups_with_rates_of_their_own_are_kept_apart():
    class Groups(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.drop = nn.Identity()
            self.second.weight.requires_grad_(False)

        def configure_optimizers(self):
            slow = [{"params": self.first.parameters(), "lr": 1e-3}]
            rest = [*self.head.parameters(), *self.second.parameters()]
            return torch.optim.Adam([*slow, {"params": rest}], 1e-2)

    def make():
        L.seed_everything(5, verbose=False)
        return Groups().double()

    for twin, alone in zip(*twins_and_separate_runs(make, batches(24)), strict=True):
        assert largest_difference(twin, alone) < 1e-10


def test_twin_skips_a_batch_of_its_example_alone():
    lists = [[3], [1, 2, 4], [3, 5], [6, 7], [3], [8, 9, 3], [10, 11]]

    def separate():
        module = net("res2", adam)
        fit(module, [rows for rows in without(3, lists) if rows])
        return module.state_dict()

    probe = StabilityProbe(removed=[3, 7], strict=True)
    fit(net("res2", adam), lists, [probe])
    assert largest_difference(probe.twin_state_dict(0), separate()) < 1e-10


def test_example_that_a_batch_holds_twice_is_left_out_twice():
    lists = [[0, 3, 3, 1], [3, 2, 4, 3], [5, 6, 7, 8]]
    twins, separate = twins_and_separate_runs(
        lambda: net("res2_bn", sgd), lists, removed=[3, 5]
    )
    for twin, alone in zip(twins, separate, strict=True):
        assert largest_difference(twin, alone) < 1e-10


class Dropped(FunctionalNet):
    """Dropout and no batch norm: masks are the run's own."""

    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Linear(16, 16)
        if not norm:
            self.norm = nn.Identity()

    def weighted_step(self, weights):
        self.weights = weights
        return self

    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        weights = getattr(self, "weights", None)
        if weights is None:
            return losses.mean()
        own = weights[batch_idx]
        return (losses * own).sum() / own.sum()


def test_twins_under_dropout_draw_the_masks_of_the_run():
    lists = batches(24)

    def make():
        L.seed_everything(5, verbose=False)
        return Dropped().double()

    probe = StabilityProbe(removed=REMOVED, strict=True)
    fit(make(), lists, [probe])
    for k, index in enumerate(REMOVED):
        # The same batch, so the same masks, with no weight on the example.
        weights = [torch.tensor([float(i != index) for i in rows]) for rows in lists]
        alone = make().weighted_step(weights)
        fit(alone, lists)
        assert largest_difference(probe.twin_state_dict(k), alone.state_dict()) < 1e-10


def test_without_exclusion_the_example_stays_in_the_batch_statistics():
    lists = batches(16)
    probe = StabilityProbe(removed=REMOVED, bn_excludes_removed=False, strict=True)

    def make():
        L.seed_everything(5, verbose=False)
        module = Dropped(norm=True)
        module.drop = nn.Identity()
        return module.double()

    fit(make(), lists, [probe])
    weights = [torch.tensor([float(i != 17) for i in rows]) for rows in lists]
    alone = make().weighted_step(weights)
    fit(alone, lists)
    assert largest_difference(probe.twin_state_dict(1), alone.state_dict()) < 1e-10


def test_replaced_example_gives_the_run_on_the_data_with_another_in_its_place():
    lists = batches(24)
    probe = StabilityProbe(
        removed=[3, 17], replace=True, strict=True, num_examples=5, seed=1
    )
    fit(net("res2_bn", sgd), lists, [probe])
    generator = torch.Generator().manual_seed(1)
    order = 5 + torch.randperm(2, generator=generator)
    val = data(20)
    for k, index in enumerate([3, 17]):
        x, y = (tensor.clone() for tensor in data().tensors)
        x[index], y[index] = val.tensors[0][order[k]], val.tensors[1][order[k]]
        alone = net("res2_bn", sgd)
        fit(alone, lists, train=TensorDataset(x, y))
        assert largest_difference(probe.twin_state_dict(k), alone.state_dict()) < 1e-10


def test_twins_in_float32_stay_as_near_to_separate_runs_as_rounding_allows():
    def single(optimizer):
        return partial(net, "res2_bn", optimizer, torch.float32)

    twins, separate = twins_and_separate_runs(single(sgd), batches(50))
    for twin, alone in zip(twins, separate, strict=True):
        assert largest_difference(twin, alone) < 1e-5
    twins, separate = twins_and_separate_runs(single(adam), batches(50))
    perturbed = single(adam)()
    with torch.no_grad():
        for p in perturbed.parameters():
            p.mul_(1 + torch.finfo(torch.float32).eps)
    fit(perturbed, without(REMOVED[0], batches(50)))
    reach = largest_difference(perturbed.state_dict(), separate[0])
    assert largest_difference(twins[0], separate[0]) <= 2 * reach


def test_models_that_cannot_be_vectorised_have_exact_twins_too():
    class Branching(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.drop = nn.Identity()
            # Adam makes steps of the rounding in gradients that batch norm cancels.
            self.norm = nn.Identity()

        def forward(self, x):
            return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0) + (
                self.head.bias * (1.0 if self.head.bias.sum().item() > 0 else 0.5)
            )

    def make():
        L.seed_everything(5, verbose=False)
        return Branching().double()

    for twin, alone in zip(*twins_and_separate_runs(make, batches(12)), strict=True):
        assert largest_difference(twin, alone) < 1e-12


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_are_those_of_the_batch_with_workers_that_run_ahead(workers):
    class Seen(StabilityProbe):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            rows = self._follower.training._hits.local
            for index, own in zip(self._left_out.removed, rows, strict=True):
                for row in own:
                    assert torch.equal(batch[0][row], examples[index][0])
                    self.found += 1

        found = 0

    examples = data()
    probe = Seen(12, strict=True)
    L.seed_everything(0, verbose=False)
    loader = DataLoader(examples, 8, shuffle=True, num_workers=workers)
    trainer = quiet_trainer(max_epochs=3, callbacks=[probe])
    trainer.fit(net(), loader, DataLoader(data(20), 20))
    assert probe.found == 36


def test_twins_resumed_amid_an_epoch_end_with_the_same_bits(tmp_path):
    def run(steps, **options):
        probe = StabilityProbe(6, cadence=4)
        checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7)
        trainer = quiet_trainer(
            max_steps=steps, callbacks=[probe, checkpoint], enable_checkpointing=True
        )
        module = LitResNetBN(3, 16, optimizer=adam)
        digits = Digits(num_train=60, num_val=30, batch_size=10)
        trainer.fit(module, digits, **options)
        return trainer, probe

    L.seed_everything(1, verbose=False)
    whole, expected = run(15)
    L.seed_everything(1, verbose=False)
    run(7)
    rest, resumed = run(15, ckpt_path=tmp_path / "last.ckpt")
    for k in range(6):
        for name, value in expected.twin_state_dict(k).items():
            assert torch.equal(resumed.twin_state_dict(k)[name], value)
    for key, value in whole.callback_metrics.items():
        if key.startswith("stability/") and "seconds" not in key:
            assert rest.callback_metrics[key] == value


def test_checkpoint_of_a_run_is_evaluated_with_its_twins(tmp_path):
    lists = batches(12)
    probe = StabilityProbe(removed=REMOVED)
    trainer = fit(net(), lists, [probe])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = quiet_trainer(callbacks=[StabilityProbe(removed=REMOVED)])
    val = DataLoader(data(20), batch_size=20)
    other.validate(net(), val, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    for key in ("stability/eps_hyp", "stability/eps_point", "stability/distance"):
        assert other.callback_metrics[key] == trainer.callback_metrics[key]
        assert other.callback_metrics[key] > 0


def test_evaluation_without_a_training_measures_nothing():
    trainer = quiet_trainer(callbacks=[StabilityProbe(removed=REMOVED)])
    trainer.validate(net(), DataLoader(data(20), batch_size=20), verbose=False)
    assert not [key for key in trainer.callback_metrics if "stability" in key]


def test_another_fit_of_the_trainer_goes_on_with_the_twins():
    lists = batches(16)
    plain = partial(torch.optim.SGD, lr=0.01)  # Lightning begins a fit without momentum
    whole = StabilityProbe(removed=REMOVED, strict=True)
    expected = fit(net(optimizer=plain), lists, [whole]).callback_metrics
    probe = StabilityProbe(removed=REMOVED, strict=True)
    module = net(optimizer=plain)
    trainer = fit(module, lists[:9], [probe])
    trainer.fit_loop.max_epochs = 2
    loader = DataLoader(data(), batch_sampler=lists[9:])
    trainer.fit(module, loader, DataLoader(data(20), 20))
    for k in range(len(REMOVED)):
        for name, value in whole.twin_state_dict(k).items():
            assert torch.equal(probe.twin_state_dict(k)[name], value)
    for key in ("stability/eps_hyp", "stability/eps_point", "stability/distance"):
        assert trainer.callback_metrics[key] == expected[key]


def test_twins_that_begin_amid_a_run_say_so(tmp_path):
    trainer = fit(net(), batches(6))
    trainer.save_checkpoint(tmp_path / "amid.ckpt")
    later = quiet_trainer(max_steps=8, callbacks=[StabilityProbe(removed=REMOVED)])
    loaders = DataLoader(data(), 12), DataLoader(data(20), 20)
    with pytest.warns(UserWarning, match="6 steps.*holds no twins: they begin here"):
        later.fit(net(), *loaders, ckpt_path=tmp_path / "amid.ckpt")


def test_values_before_any_example_is_seen_are_zero_and_the_table_names_each_twin(
    tmp_path,
):
    class Tables(CSVLogger):
        rows = None

        def log_table(self, key, columns, data, step):
            if key == "stability/twins":
                self.rows = [dict(zip(columns, row, strict=True)) for row in data]

    logger = Tables(tmp_path)
    logger.log_metrics = lambda metrics, step: seen.setdefault(step, metrics)
    logger.save = lambda: None
    seen = {}
    lists = [[0, 1, 2], [3, 4, 5], [17, 6, 7]]
    fit(net(), lists, [StabilityProbe(removed=REMOVED, cadence=1)], logger=logger)
    assert seen[0]["stability/eps_hyp"] == seen[1]["stability/distance"] == 0
    assert seen[2]["stability/eps_hyp"] > 0
    assert [row["removed"] for row in logger.rows] == REMOVED
    assert [row["first_step"] for row in logger.rows] == [1, 2, None]
    assert [row["distance"] > 0 for row in logger.rows] == [True, True, False]


def test_diverged_twin_is_counted_and_left_out_of_the_means():
    class Exploding(StabilityProbe):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                self._copies.params["net.blocks.0.w1.weight"][1] = torch.inf
            super().on_train_batch_end(trainer, *args)

    trainer = fit(net(), batches(12), [Exploding(removed=REMOVED, strict=True)])
    values = trainer.callback_metrics
    assert values["stability/diverged"] == 1
    assert 0 < values["stability/eps_hyp"] < 10
    assert torch.isfinite(values["stability/distance"])


def test_influence_is_estimated_through_attention():
    class Attending(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            tokens = x.view(-1, 2, 4)
            mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            return super().forward(mixed.flatten(1))

    L.seed_everything(7, verbose=False)
    probe = StabilityProbe(num_twins=2, method="influence", strict=True)
    trainer = quiet_trainer(max_epochs=1, callbacks=[probe])  # all examples are seen
    trainer.fit(Attending(), *loaders())
    assert trainer.callback_metrics["stability/eps_hyp"] > 0


def test_influence_estimates_run_beside_the_training_without_twins(tmp_path):
    probe = StabilityProbe(removed=REMOVED, method="influence", strict=True)
    trainer = fit(net("res2_bn"), batches(24), [probe])
    assert trainer.callback_metrics["stability/replace_signed"] > 0
    assert trainer.callback_metrics["stability/eps_hyp"] > 0
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = StabilityProbe(removed=REMOVED, method="influence", strict=True)
    other = quiet_trainer(callbacks=[again])
    val = DataLoader(data(20), batch_size=20)
    path = tmp_path / "end.ckpt"
    other.validate(net("res2_bn"), val, ckpt_path=path, verbose=False)
    for key in ("stability/eps_hyp", "stability/replace_signed"):
        assert other.callback_metrics[key] == trainer.callback_metrics[key]


class Penalised(FunctionalNet):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.drop = nn.Identity()  # other masks make other losses

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1


class Manual(Penalised):
    automatic_optimization = False


class Pairs(Penalised):
    def forward(self, x):
        return super().forward(x), x

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch, batch_idx):
        pass


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize(
    ("module", "train", "options", "message"),
    [
        (net, data(), {"num_twins": 49}, "num_twins is 49, and the training set"),
        (net, data(), {"removed": [3, 48]}, r"removed names \[48\].*0 to 47"),
        (net, Stream(), {}, "Stream is iterable"),
        (Penalised, data(dtype=torch.float32), {}, "training loss.*give loss_fn"),
        (
            Penalised,
            data(dtype=torch.float32),
            {"method": "influence"},
            "training loss.*give loss_fn",
        ),
        (
            Pairs,
            data(dtype=torch.float32),
            {},
            "^stability: the probe batch's losses.*of a tuple.*give loss_fn",
        ),
        (Manual, data(dtype=torch.float32), {}, "manual optimization"),
        (
            partial(net, optimizer=lambda p: torch.optim.LBFGS(p)),
            data(),
            {},
            "LBFGS",
        ),
    ],
)
def test_runs_that_cannot_be_twinned_are_refused_with_the_reason(
    module, train, options, message
):
    trainer = quiet_trainer(max_steps=1, callbacks=[StabilityProbe(**options)])
    trained = module()
    val = data(20, next(trained.parameters()).dtype)
    with pytest.raises(ValueError, match=message):
        trainer.fit(trained, DataLoader(train, 8), DataLoader(val, 20))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_twins": 0}, "num_twins is 0"),
        ({"removed": []}, "removed is"),
        ({"removed": [1, 1]}, r"removed is \[1, 1\]"),
        ({"removed": [1.5]}, r"removed is \[1.5\]"),
        ({"num_twins": 2.5}, "num_twins is 2.5; it must be a whole number"),
        ({"sites": "act"}, "sites is 'act'; StabilityProbe looks at no layers"),
        ({"method": "guess"}, "method is 'guess'"),
        ({"norm_mode": "train"}, "norm_mode is 'train'"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"memory": 0}, "memory is 0"),
        ({"method": "influence", "replace": True}, "replace"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StabilityProbe(**options)


def test_sampler_that_draws_with_replacement_works():
    sampler = RandomSampler(data(), replacement=True, num_samples=96)
    probe = StabilityProbe(8, strict=True)
    trainer = quiet_trainer(max_epochs=2, callbacks=[probe])
    loader = DataLoader(data(), 8, sampler=sampler)
    trainer.fit(net("res2_bn"), loader, DataLoader(data(20), 20))
    assert trainer.callback_metrics["stability/eps_hyp"] > 0


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("method", "apart", "relative"),
    # conjugate gradients end at a residual of 1e-4, wherever rounding leads them
    [("twins", 1e-5, 1e-3), ("influence", 1e-4, 1e-2)],
)
def test_copies_on_two_ranks_equal_those_of_one_process(
    tmp_path, method, apart, relative
):
    class Kept(StabilityProbe):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            if trainer.is_global_zero:
                weights = [self.twin_state_dict(k) for k in range(4)]
                torch.save(weights, tmp_path / f"{trainer.world_size}.pt")

    def run(devices):
        L.seed_everything(1, verbose=False)
        options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        probe = Kept(4, method=method, strict=True)
        trainer = quiet_trainer(
            max_steps=12, callbacks=[probe], gradient_clip_val=0.5, **options
        )
        digits = Digits(num_train=40, num_val=31, batch_size=10 // devices)
        trainer.fit(LitMLP(3, 16, optimizer=sgd), digits)
        values = trainer.callback_metrics
        return torch.load(tmp_path / f"{devices}.pt"), values

    (two, values), (one, expected) = run(2), run(1)
    for k in range(4):
        assert largest_difference(two[k], one[k]) < apart
    for key in ("eps_hyp", "eps_point", "eps_unif", "distance", "generalization_gap"):
        name = f"stability/{key}"
        assert values[name] == pytest.approx(expected[name].item(), rel=relative), name


def test_checkpoints_grow_by_what_is_said_and_the_twins_may_be_left_out(
    tmp_path, caplog
):
    def run(save_twins, max_steps, path=None):
        probe = StabilityProbe(num_twins=3, num_examples=16, save_twins=save_twins)
        trainer = quiet_trainer(max_steps=max_steps, callbacks=[probe])
        digits = Digits(num_train=60, num_val=20, batch_size=20)
        trainer.fit(LitMLP(depth=2, width=128), digits, ckpt_path=path)
        return trainer

    sizes = {}
    for save_twins in (True, False):
        path = tmp_path / f"{save_twins}.ckpt"
        with caplog.at_level("INFO"):
            trainer = run(save_twins, 3)
            for _ in range(2):
                trainer.save_checkpoint(path)
        sizes[save_twins] = path.stat().st_size
    (said,) = [text for text in caplog.messages if "checkpoints hold" in text]
    found = re.search(r"3 twins, (\S+) MB beside (\S+) MB of .* (\S+) times", said)
    own, rest, times = map(float, found.groups())
    # the archive has 64 bytes of padding a tensor, and the optimizer's settings
    assert sizes[True] - sizes[False] == pytest.approx(own * 1e6, rel=0.1)
    assert times == pytest.approx(1 + own / rest, abs=0.06)
    with pytest.warns(UserWarning, match="holds no twins: they begin here"):
        again = run(False, 6, path)
    assert again.callback_metrics["stability/eps_hyp"].isfinite()

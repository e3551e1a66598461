import functools
import inspect
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset, TensorDataset

from lit_resnorm.modules import (
    LitClassifier,
    LitMLP,
    LitMLPBN,
    LitPreactResNet,
    LitResNet,
    LitResNetBN,
    LitSkipInit,
    LitSmoothResNet,
    LitStack,
)
from lit_resnorm.modules.losses import EpochMeans


class SkippingLoader(DataLoader):
    """A loader that goes on within an epoch, by Lightning's protocol."""

    start = done = 0

    def __iter__(self):
        skip, self.start = self.start, 0
        self.done = skip
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.done += 1
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = 0 if state["done"] >= len(self) else state["done"]


class Data(L.LightningDataModule):
    """Random examples, rank r of n taking every n-th, in batches of 8."""

    def __init__(self, num: int = 60, bad: int | None = None, num_classes: int = 10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num, 1, 8, 8, generator=generator)
        self.y = torch.randint(num_classes, (num,), generator=generator)
        self.num_classes = num_classes
        self.train_x = self.x.clone()
        if bad is not None:
            self.train_x[bad] = torch.inf

    def loader(self, x, batch_size):
        data = TensorDataset(x, self.y)
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        share = Subset(data, range(rank, len(data), ranks))
        return SkippingLoader(share, batch_size=batch_size)

    def train_dataloader(self):
        return self.loader(self.train_x, 8)

    def val_dataloader(self):
        return self.loader(self.x, 7)

    test_dataloader = val_dataloader


def trainer(**kwargs) -> L.Trainer:
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**options | kwargs)


def resnet(kind: type[LitClassifier] = LitResNet, **kwargs) -> LitClassifier:
    torch.manual_seed(0)
    return kind(depth=2, width=16, **kwargs)


def sgd(lr: float):
    return functools.partial(torch.optim.SGD, lr=lr)


def direct_means(module: LitClassifier, data: Data) -> tuple[float, float]:
    """Return loss and accuracy over all examples at once, in float64."""
    with torch.no_grad():
        output = module.double()(data.x.double())
    loss = F.cross_entropy(output, data.y)
    return loss.item(), (output.argmax(1) == data.y).double().mean().item()


def test_cross_entropy_by_example_averages_to_torchs():
    output, target = torch.randn(6, 4), torch.randint(4, (6,))
    losses = resnet().losses(output, target)
    assert losses.shape == (6,)
    assert_close(losses.mean(), F.cross_entropy(output, target))


def test_mse_is_half_the_squared_distance_to_the_target_summed_over_outputs():
    module = resnet(loss="mse")
    output, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = (output - torch.eye(4)[target]).square().sum(1) / 2
    assert_close(module.losses(output, target), expected)
    assert_close(module.losses(output, torch.eye(4)[target]), expected)


def test_losses_of_bf16_outputs_are_float32_and_of_float64_outputs_float64():
    module, target = resnet(), torch.tensor([0, 1])
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        output = torch.zeros(2, 10, dtype=dtype)
        assert module.losses(output, target).dtype == expected


@pytest.mark.parametrize(
    "target", [torch.zeros(6, 3), torch.zeros(5, 4), torch.zeros(5).long()]
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_targets_that_do_not_match_are_refused_with_loss_and_shapes(loss, target):
    with pytest.raises(ValueError, match=rf"loss='{loss}' .*output \(6, 4\)"):
        resnet(loss=loss).losses(torch.zeros(6, 4), target)


@pytest.mark.parametrize("option", ["loss", "lr_interval", "on_divergence"])
def test_an_unknown_choice_is_refused_by_name_and_value(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*got 'never'"):
        resnet(**{option: "never"})


def test_another_number_of_classes_than_the_datas_is_refused_before_training():
    with pytest.raises(ValueError, match=r"num_classes=10 of the model.*has 3"):
        trainer().fit(resnet(), datamodule=Data(num_classes=3))


def test_depth_counts_blocks_and_num_weight_layers_their_matrices():
    assert LitMLP(10, 16).num_weight_layers == 10
    assert LitResNet(5, 16).num_weight_layers == 10
    assert LitResNet(10, 16, layers_per_block=1).num_weight_layers == 10
    staged = LitPreactResNet(stages=[1, 2], width=4)
    assert staged.num_weight_layers == 6
    assert [b.w1.out_channels for b in staged.net.blocks] == [4, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "depth or stages must be given"),
        ({"depth": 3, "stages": [1, 1], "width": 4}, "depth=3 isn't the sum of"),
        ({"depth": 3}, "width or widths must be given"),
        ({"depth": 3, "width": 4, "widths": [8]}, "width=4 isn't the first of"),
        ({"depth": 0, "width": 4}, "stages must be at least 1; got 0"),
    ],
)
def test_stages_that_contradict_depth_or_width_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LitPreactResNet(**arguments)


def test_tied_smooth_nets_own_one_weight():
    module = LitSmoothResNet(6, 64, tied=True)
    assert module.net.blocks[0].w1 is module.net.blocks[5].w1
    assert module.net.blocks[5].branch_scale == pytest.approx(1 / 6)


def test_skipinit_starts_at_the_asked_multiplier():
    assert LitSkipInit(4, 64).net.blocks[0].scale.alpha.item() == 0
    half = LitSkipInit(4, 64, start="inverse_sqrt_depth").net
    assert half.blocks[0].scale.alpha.item() == pytest.approx(0.5)
    assert half.blocks[0].w1.bias is not None
    assert LitSkipInit(4, 64, rezero=True).net.blocks[0].w1.bias is None


def test_means_over_uneven_batches_are_those_over_examples():
    data, module = Data(61), resnet(optimizer=sgd(0.0))
    fit = trainer(max_epochs=2, precision="64-true")
    fit.fit(module, datamodule=data)
    logged = dict(fit.callback_metrics)
    fit.test(module, data, verbose=False)
    logged |= fit.callback_metrics
    loss, accuracy = direct_means(module, data)
    for name in ("train/loss_epoch", "val/loss", "test/loss"):
        assert logged[name].item() == pytest.approx(loss, rel=1e-9), name
    for name in ("train/accuracy", "val/accuracy", "test/accuracy"):
        assert logged[name].item() == pytest.approx(accuracy, rel=1e-9), name
    assert abs(logged["generalization_gap"].item()) < 1e-9


def test_generalization_gap_is_logged_in_fits_only():
    data, module = Data(), resnet()
    run = trainer()
    run.validate(module, data, verbose=False)
    assert "generalization_gap" not in run.callback_metrics
    run.fit(module, datamodule=data)
    logged = run.callback_metrics
    gap = logged["val/loss"] - logged["train/loss_epoch"]
    assert_close(logged["generalization_gap"], gap, rtol=0, atol=0)


class Gaps(L.Callback):
    """Gathers the gap at each validation."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        self.values.append(trainer.callback_metrics["generalization_gap"].item())


def test_a_validation_within_an_epoch_compares_with_the_epoch_so_far():
    data, module, gaps = Data(32), resnet(optimizer=sgd(0.0)), Gaps()
    trainer(val_check_interval=2, callbacks=[gaps]).fit(module, datamodule=data)
    with torch.no_grad():
        losses = module.losses(module(data.x), data.y)
    expected = [losses.mean() - losses[:16].mean(), 0.0]
    assert gaps.values == pytest.approx([float(e) for e in expected], abs=1e-6)


def checkpoint_at(step: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=step, save_top_k=-1
    )


@pytest.mark.parametrize("kind", [LitResNet, LitResNetBN])
def test_a_run_resumed_within_an_epoch_logs_the_same_bits(kind, tmp_path):
    def fit(path=None, **kwargs):
        run = trainer(max_epochs=2, **kwargs)
        module = resnet(kind)
        run.fit(module, datamodule=Data(), ckpt_path=path, weights_only=True)
        return run.callback_metrics, module.state_dict()

    whole, weights = fit(
        callbacks=[checkpoint_at(3, tmp_path)], enable_checkpointing=True
    )
    for step in (3, 12):  # eight batches an epoch: within the first and the second
        resumed, resumed_weights = fit(tmp_path / f"step={step}.ckpt")
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
        for name, value in weights.items():
            assert torch.equal(value, resumed_weights[name]), name


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1), (3, 2)])
def test_sums_of_another_number_of_ranks_keep_their_total(saved, now):
    rows = torch.arange(3.0 * saved).reshape(saved, 3)
    total = torch.zeros(3)
    for rank in range(now):
        means = EpochMeans()
        means.restore(rows, rank, now)
        total += means.sums
    assert_close(total, rows.sum(0))


@pytest.mark.ddp
def test_two_uneven_ranks_log_the_means_of_the_whole_and_resume_to_the_bit(tmp_path):
    data = Data(61)

    def fit(path=None, **kwargs):
        run = trainer(strategy="ddp_fork", devices=2, precision="64-true", **kwargs)
        module = resnet(optimizer=sgd(0.0))
        run.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return run.callback_metrics

    whole = fit(callbacks=[checkpoint_at(3, tmp_path)], enable_checkpointing=True)
    loss, accuracy = direct_means(resnet(), data)
    last = list(range(48, 61))  # the fourth batches of the two ranks
    module = resnet().double()
    with torch.no_grad():
        step_loss = module.losses(module(data.x[last].double()), data.y[last]).mean()
    expected = {
        "train/loss": step_loss.item(),
        "train/loss_epoch": loss,
        "train/accuracy": accuracy,
        "val/loss": loss,
        "val/accuracy": accuracy,
    }
    for name, value in expected.items():
        assert whole[name].item() == pytest.approx(value, rel=1e-9), name
    resumed = fit(tmp_path / "step=3.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_a_diverged_run_stops_with_the_weights_from_before(options):
    healthy = resnet()
    trainer(max_steps=2, **options).fit(healthy, datamodule=Data())
    bad = 8 * 2 * options.get("accumulate_grad_batches", 1)
    diverged = resnet()
    run = trainer(max_epochs=5, **options)
    with pytest.warns(UserWarning, match="at step 2 isn't finite"):
        run.fit(diverged, datamodule=Data(bad=bad))
    assert diverged.diverged
    assert not healthy.diverged
    assert run.global_step == 3
    for name, value in healthy.state_dict().items():
        assert torch.equal(value, diverged.state_dict()[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_diverged_step_under_a_gradient_scaler_changes_no_weight(fused):
    def fit(data, **kwargs):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        optimizer = functools.partial(torch.optim.SGD, lr=0.01, fused=fused)
        module = resnet(optimizer=optimizer)
        trainer(plugins=[precision], **kwargs).fit(module, datamodule=data)
        return module

    healthy = fit(Data(), max_steps=2)
    with pytest.warns(UserWarning, match="at step 2 isn't finite"):
        diverged = fit(Data(bad=16))
    assert diverged.diverged
    for name, value in healthy.state_dict().items():
        assert torch.equal(value, diverged.state_dict()[name]), name


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


@pytest.mark.parametrize("every", [1, 3])
def test_the_training_loss_is_logged_at_the_steps_that_the_trainer_logs(every):
    logger = Rows()
    run = trainer(
        max_epochs=2,
        logger=logger,
        log_every_n_steps=every,
        accumulate_grad_batches=2,
    )
    run.fit(resnet(), datamodule=Data())
    steps = [step for step, row in logger.rows if "train/loss" in row]
    # Eight batches an epoch: four optimizer steps.
    assert steps == [step for step in range(8) if (step + 1) % every == 0]


def test_a_diverged_run_can_go_on():
    module = resnet(on_divergence="continue")
    run = trainer(max_epochs=2)
    run.fit(module, datamodule=Data(bad=16))
    assert module.diverged
    assert run.global_step == 16


def test_a_run_that_goes_on_knows_that_it_had_diverged(tmp_path):
    options = {"max_epochs": 1, "limit_val_batches": 0}
    first = trainer(**options)
    first.fit(resnet(on_divergence="continue"), datamodule=Data(bad=16))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = resnet(on_divergence="continue")
    # its weights are no numbers, but for this the checkpoint need not be asked
    trainer(max_epochs=1).fit(
        again, datamodule=Data(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert again.diverged
    trainer(max_steps=0).fit(again, datamodule=Data())
    assert not again.diverged


@pytest.mark.ddp
def test_one_rank_that_diverges_stops_both_with_finite_weights():
    module = resnet()
    run = trainer(strategy="ddp_fork", devices=2, max_epochs=3)
    run.fit(module, datamodule=Data(bad=17))  # rank 1, second batch
    assert not run.callback_metrics["train/loss_epoch"].isfinite()
    assert all(p.isfinite().all() for p in module.parameters())


def test_checkpoints_make_the_module_again_with_weights_only(tmp_path):
    module = resnet(LitResNetBN, loss="mse", in_shape=(1, 8, 8), gain=0.5)
    run = trainer()
    run.fit(module, datamodule=Data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = LitResNetBN.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.loss == "mse"
    assert again.hparams == module.hparams
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_a_module_with_default_and_given_optimizers_pickles():
    for module in (resnet(), resnet(optimizer=sgd(0.1))):
        again = pickle.loads(pickle.dumps(module))
        assert isinstance(again.configure_optimizers(), torch.optim.SGD)


@pytest.fixture
def command_line(monkeypatch):
    # LightningCLI warns of arguments beside those of the process.
    monkeypatch.setattr("sys.argv", ["train.py"])
    return run_command_line


def run_command_line(*args: str) -> LightningCLI:
    return LightningCLI(
        LitClassifier,
        Data,
        args=list(args),
        run=False,
        subclass_mode_model=True,
        save_config_callback=None,
        trainer_defaults={
            "accelerator": "cpu",
            "logger": False,
            "max_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
    )


def test_command_line_takes_short_names_and_any_optimizer_and_scheduler(
    command_line, tmp_path
):
    scheduler = "torch.optim.lr_scheduler.OneCycleLR"
    cli = command_line(
        "--model=LitResNetBN",
        "--model.depth=5",
        "--model.width=8",
        "--model.optimizer=torch.optim.Adam",
        "--model.optimizer.lr=1e-3",
        f"--model.lr_scheduler={scheduler}",
        "--model.lr_scheduler.max_lr=1e-3",
        "--model.lr_scheduler.total_steps=10",
        "--model.lr_interval=step",
        "--trainer.use_distributed_sampler=false",
    )
    module = cli.model
    assert type(module) is LitResNetBN
    assert module.hparams["optimizer"]["class_path"] == "torch.optim.Adam"
    config = module.configure_optimizers()
    assert isinstance(config["optimizer"], torch.optim.Adam)
    assert config["lr_scheduler"]["scheduler"].total_steps == 10
    assert config["lr_scheduler"]["interval"] == "step"
    path = tmp_path / "cli.ckpt"
    cli.trainer.fit(module, cli.datamodule)
    cli.trainer.save_checkpoint(path)
    again = LitResNetBN.load_from_checkpoint(path, weights_only=True)
    assert isinstance(again.configure_optimizers()["optimizer"], torch.optim.Adam)


def test_command_line_shows_every_switch_and_the_default_optimizer(
    command_line, capsys
):
    with pytest.raises(SystemExit) as exit_info:
        command_line(
            "--model=LitMLP", "--model.depth=5", "--model.width=8", "--print_config"
        )
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for line in ("class_path: torch.optim.SGD", "lr: 0.05", "gain: 1.0", "norm: none"):
        assert line in shown
    assert "residual" not in shown


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, threshold=1e9
    )


def test_a_plateau_schedule_by_step_is_refused_before_training():
    module = resnet(lr_scheduler=plateau, lr_interval="step")
    with pytest.raises(ValueError, match="lr_interval='step' doesn't go with"):
        trainer().fit(module, datamodule=Data())


def test_any_network_trains_with_a_plateau_schedule_and_an_index_in_the_batch():
    data = Data()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module = LitClassifier(net, lr_scheduler=plateau)
    indexed = TensorDataset(data.x, data.y, torch.arange(60))
    loader = DataLoader(indexed, batch_size=16)
    run = trainer(max_epochs=3)
    run.fit(module, loader, loader)
    assert run.optimizers[0].param_groups[0]["lr"] < 0.05
    assert len(run.predict(module, loader)) == 4


def test_a_declared_variant_fixes_options_and_starts_from_defaults_of_its_own():
    class Narrow(LitStack, fixed={"residual": False}, defaults={"width": 3}):
        """Of three units."""

    module = Narrow(2, activation="tanh")
    assert module.net.blocks[0].w1.weight.shape == (3, 3)
    assert module.hparams["width"] == 3
    assert module.hparams["activation"] == "tanh"
    parameters = inspect.signature(Narrow).parameters
    assert parameters["width"].default == 3
    assert parameters["depth"].default is inspect.Parameter.empty
    assert "residual" not in parameters
    with pytest.raises(TypeError, match="residual"):
        Narrow(2, residual=True)


def test_a_declared_variant_can_be_the_base_of_another():
    class Twice(LitMLPBN, defaults={"layers_per_block": 2}):
        """Two layers a block."""

    module = Twice(depth=3, width=4)
    assert module.num_weight_layers == LitMLPBN(depth=6, width=4).num_weight_layers
    assert isinstance(module.net.blocks[0].norm2, torch.nn.BatchNorm1d)


@pytest.mark.parametrize("kind", ["fixed", "defaults"])
def test_a_variant_of_an_option_that_its_base_lacks_is_refused(kind):
    with pytest.raises(TypeError, match="Wrong: the base has no wide"):
        type("Wrong", (LitStack,), {}, **{kind: {"wide": 1}})

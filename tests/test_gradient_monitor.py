"""Gradients, updates and the gradient noise scale against values by hand."""

import logging
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from ranks import run_ranks, sum_over_ranks
from small import FunctionalNet, loaders, quiet_trainer, vectors
from test_probe_contract import (
    Recorder,
    TwoOptimizers,
    assert_same_state,
    fit,
    training_state,
    values,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.measures.gradients import gradient_noise
from lit_resnorm.measures.taken_step import StepWatch, sizes_of_step
from lit_resnorm_callbacks import Cadence, GradientMonitor

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Double(L.LightningModule):
    """Two layers in float64; the mean squared error of torch's loss."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.last = nn.Linear(8, 6).double(), nn.Linear(6, 3).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.loss = nn.CrossEntropyLoss()
        self.make = lambda: optimizer(self.parameters(), **{"lr": 0.1, **options})

    def forward(self, x):
        return self.last(F.relu(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make()


def double_data(num=24):
    x, y = vectors(num).tensors
    return TensorDataset(x.double(), y)


def rows_by_step(recorder, name="gradients"):
    """What a probe logged, by step, without its prefix."""
    found = {}
    for step, row in recorder.rows:
        own = {k.partition("/")[2]: v for k, v in row.items() if k.startswith(name)}
        if own:
            found.setdefault(step, {}).update(own)
    return found


def measured(module, *, steps=3, probe=None, batch_size=4, **options):
    recorder = Recorder()
    probe = probe or GradientMonitor(cadence=1, num_examples=8, log="all")
    trainer = quiet_trainer(
        max_steps=steps, callbacks=[probe], logger=recorder, **options
    )
    data = double_data()
    loader = DataLoader(data, batch_size)
    trainer.fit(module, loader, loader)
    return rows_by_step(recorder)


def test_norms_ratios_and_clipping_are_those_worked_out_by_hand():
    rows = measured(
        Double(momentum=0.9, weight_decay=0.1),
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    module = Double(momentum=0.9, weight_decay=0.1)
    optimizer = module.configure_optimizers()
    batches = [*DataLoader(double_data(), 4)]
    for step in range(3):
        optimizer.zero_grad()
        for x, y in batches[2 * step : 2 * step + 2]:
            (F.cross_entropy(module(x), y) / 2).backward()
        layers = {"000.first": module.first, "002.last": module.last}
        expected = {}
        for site, layer in layers.items():
            grad = torch.cat([p.grad.flatten() for p in layer.parameters()])
            expected[f"norm/{site}"] = grad.norm()
            expected[f"zero/{site}"] = (grad == 0).double().mean()
            expected[f"nonfinite/{site}"] = 0.0
        flat = {
            k: nn.utils.parameters_to_vector(m.parameters()) for k, m in layers.items()
        }
        flat = {k: v.detach().clone() for k, v in flat.items()}
        whole = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        expected["norm"], expected["clip_factor"] = whole, min(1.0, 0.5 / whole)
        optimizer.step()
        for site, layer in layers.items():
            now = nn.utils.parameters_to_vector(layer.parameters()).detach()
            expected[f"update_ratio/{site}"] = (now - flat[site]).norm() / flat[
                site
            ].norm()
        for key, value in expected.items():
            # clipping divides by the norm plus 1e-6
            bound = {"rtol": 1e-5, "atol": 0} if key == "clip_factor" else EXACT
            torch.testing.assert_close(rows[step][key], float(value), **bound)
    assert rows[0]["clip_factor"] < 1
    assert set(rows[3]) <= {"noise_scale", "noise_scale/stderr", "noise_trace"} | {
        "signal_square",
        "seconds",
    }


def noise_by_hand(gradients):
    mean = gradients.mean(0)
    trace = gradients.var(0).sum()
    return trace, mean.square().sum() - trace / len(gradients)


@pytest.mark.parametrize("weighted", [False, True])
def test_noise_scale_is_that_of_the_gradients_of_single_examples(weighted):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(48, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)),
    ).double()
    x, y = torch.randn(9, 1, 6, 6).double() + 1, torch.zeros(9).long()
    net.train()(x)
    net.eval()
    weights = torch.rand(9).double() if weighted else None
    found = gradient_noise(
        net,
        (x, y),
        lambda output, rows: F.cross_entropy(output, rows[1], reduction="none"),
        weights=weights,
        norm_mode="eval",
        forward=lambda model, rows: model(rows[0]),
    )
    shares = torch.ones(9) if weights is None else weights / weights.mean()
    rows = []
    for i, share in enumerate(shares):
        loss = share * F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, [*net.parameters()])
        rows.append(torch.cat([g.flatten() for g in grads]))
    gradients = torch.stack(rows)
    trace, signal = noise_by_hand(gradients)
    assert signal > 0
    torch.testing.assert_close(found.trace, trace, **EXACT)
    torch.testing.assert_close(found.signal_square, signal, **EXACT)
    torch.testing.assert_close(found.scale, trace / signal, **EXACT)
    without = [gradients[torch.arange(9) != i] for i in range(9)]
    inverses = torch.stack([s / t for t, s in map(noise_by_hand, without)])
    spread = inverses.var(correction=0) * 8
    torch.testing.assert_close(
        found.stderr, (trace / signal) ** 2 * spread.sqrt(), **EXACT
    )


def test_a_gradient_that_is_all_noise_has_an_infinite_scale():
    net = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1.0], [-1.0]]).double()
    found = gradient_noise(net, x, lambda output, _: output[:, 0])
    assert float(found.trace) == 2
    assert float(found.signal_square) == -1
    assert math.isinf(found.scale)


def test_the_logged_noise_is_of_the_weights_before_the_step():
    probe = GradientMonitor(cadence=Cadence(2, at_start=False), noise_cadence=2)
    module = Double()
    rows = measured(module, probe=probe, steps=5)
    assert [step for step, row in rows.items() if "noise_scale" in row] == [2, 4, 5]
    fresh = Double()
    optimizer = fresh.configure_optimizers()
    batches = [*DataLoader(double_data(), 4)]
    for x, y in batches[:2]:
        optimizer.zero_grad()
        F.cross_entropy(fresh(x), y).backward()
        optimizer.step()
    found = gradient_noise(
        fresh,
        double_data().tensors,
        lambda output, rows: F.cross_entropy(output, rows[1], reduction="none"),
        forward=lambda model, rows: model(rows[0]),
    )
    torch.testing.assert_close(rows[2]["noise_trace"], float(found.trace), **EXACT)


def test_gradients_under_a_scaler_are_unscaled_and_a_skipped_step_moves_nothing():
    class Overflows(FunctionalNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == 1 else 1.0)

    def rows(**options):
        L.seed_everything(7, verbose=False)
        recorder = Recorder()
        probe = GradientMonitor(cadence=1, noise_cadence=None, log="all")
        trainer = quiet_trainer(
            max_steps=2, callbacks=[probe], logger=recorder, **options
        )
        trainer.fit(Overflows(), *loaders())
        return rows_by_step(recorder)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = rows(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    plain = rows(precision="bf16-mixed")
    # half precision has ten bits, bfloat16 seven
    assert scaled[0]["norm"] == pytest.approx(plain[0]["norm"], rel=0.1)
    assert scaled[1]["nonfinite/007.head"] > 0
    assert math.isnan(scaled[1]["norm"])
    assert scaled[1]["update_ratio/007.head"] == 0
    assert plain[1]["update_ratio/007.head"] != 0


def test_two_optimizers_of_a_manual_module_are_read_in_one_row():
    recorder = Recorder()
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[GradientMonitor(cadence=2, log="all")], logger=recorder
    )
    trainer.fit(TwoOptimizers(), *loaders())
    rows = rows_by_step(recorder)
    assert [*rows] == [0, 2, 4, 6, 8]
    assert rows[0]["update_ratio/000.first"] > 0
    assert rows[0]["update_ratio/007.head"] > 0
    # no optimizer holds this layer
    assert "norm/003.second" not in rows[0]


def test_training_with_clipping_accumulation_and_averaged_weights_is_bit_identical():
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2, "steps": 8}

    def trained(probes):
        return training_state(*fit([*probes, EMAWeightAveraging()], **options))

    probes = [GradientMonitor(cadence=2, num_examples=16)]
    assert_same_state(trained(probes), trained([]))


def test_frozen_and_unused_parameters_are_named(caplog):
    module = FunctionalNet()
    module.second.requires_grad_(False)
    module.spare = nn.Linear(2, 2)
    with caplog.at_level(logging.INFO):
        trainer, _ = fit([GradientMonitor(cadence=1)], steps=1, module=module)
    assert "second.weight, second.bias are frozen" in caplog.text
    assert "spare.weight, spare.bias got no gradient" in caplog.text
    assert not [k for k in values(trainer, "gradients") if "second" in k]


class Penalised(FunctionalNet):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.head.weight.norm()


def test_losses_that_do_not_make_the_training_loss_leave_the_noise_out(caplog):
    with caplog.at_level(logging.INFO):
        trainer, _ = fit([GradientMonitor(cadence=1)], steps=2, module=Penalised())
    assert "there is no gradient noise scale: the training loss" in caplog.text
    found = values(trainer, "gradients")
    assert "gradients/norm" in found
    assert not [key for key in found if "noise" in key]
    with pytest.raises(ValueError, match=r"^gradients: the training loss.*loss_fn"):
        fit([GradientMonitor(loss_fn=F.cross_entropy)], steps=2, module=Penalised())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "nope"}, r"gradients: sites is 'nope'.*000\.first"),
        ({"loss_fn": F.mse_loss}, "gradients: "),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        fit([GradientMonitor(**options)], steps=1)


@pytest.mark.parametrize("option", ["noise_cadence", "memory"])
def test_counts_of_zero_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        GradientMonitor(**{option: 0})


def test_without_a_training_the_noise_alone_is_measured():
    trainer = quiet_trainer(callbacks=[GradientMonitor()])
    trainer.validate(FunctionalNet(), loaders()[1], verbose=False)
    found = {key.partition("/")[2] for key in trainer.callback_metrics if "/" in key}
    assert found == {
        *("noise_scale", "noise_scale/stderr", "noise_trace", "signal_square"),
        "seconds",
    }


def last_values(devices):
    L.seed_everything(3, verbose=False)
    module, loader = Double(), DataLoader(double_data(), 24 // devices)
    trainer = quiet_trainer(
        max_steps=1,
        callbacks=[GradientMonitor(cadence=1, num_examples=7)],
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
    )
    trainer.fit(module, loader, loader)
    return values(trainer, "gradients")


@pytest.mark.ddp
@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_measure_what_one_process_does(devices):
    one, several = last_values(1), last_values(devices)
    assert one.keys() == several.keys()
    assert "gradients/norm/000.first" in one
    for key, value in one.items():
        # their metrics come back in single precision
        assert float(several[key]) == pytest.approx(float(value), rel=1e-6), key


class Sharded(Double):
    """The same with its weights shared out over the ranks."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.first, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def state_dict(self, *args, **kwargs):
        return {}  # shards don't come back through a pipe


class Forked(ModelParallelStrategy):
    """Lightning's strategy for sharded weights, in processes that are forked."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")

    def set_world_ranks(self, process_idx=0):
        self._local_rank = process_idx
        super().set_world_ranks()


@pytest.mark.slow
@pytest.mark.ddp
def test_sharded_weights_are_measured_as_whole_ones_without_their_noise():
    def found(module, **options):
        L.seed_everything(3, verbose=False)
        devices = options.get("devices", 1)
        loader = DataLoader(double_data(), 24 // devices)
        probe = GradientMonitor(cadence=1, num_examples=8)
        trainer = quiet_trainer(max_steps=1, callbacks=[probe], **options)
        trainer.fit(module, loader, loader)
        return values(trainer, "gradients")

    whole = found(Double())
    sharded = found(Sharded(), devices=2, strategy=Forked(2, 1))
    assert "gradients/norm/000.first" in sharded
    assert not [key for key in sharded if "noise" in key or key.endswith("/failed")]
    for key, value in sharded.items():
        # layers are numbered as they are registered
        same = key.replace("001.last", "002.last")
        assert float(value) == pytest.approx(float(whole[same]), rel=1e-6), key


def sharded_and_whole(rank):
    """Sums over the shards of a step under FSDP2, and of the same step whole."""

    def stepped(sharded):
        module = Double()
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(module.first, mesh=mesh)
            fully_shard(module, mesh=mesh)
        optimizer = torch.optim.AdamW(module.parameters(), 0.1)
        watch = StepWatch([optimizer], reads_gradients=True)
        x, y = double_data(8).tensors
        rows = slice(rank, None, 2) if sharded else slice(None)
        F.cross_entropy(module(x[rows]), y[rows]).backward()
        watch.read_gradients(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        parameters = [*module.parameters()]
        sums = sizes_of_step(watch.taken(), parameters, 2 if sharded else 1)
        return sum_over_ranks(sums) if sharded else sums

    return stepped(sharded=True), stepped(sharded=False)


@pytest.mark.slow
@pytest.mark.ddp
def test_sizes_of_sharded_weights_are_those_of_the_whole():
    for sharded, whole in run_ranks(sharded_and_whole, 2):
        torch.testing.assert_close(sharded, whole, **EXACT)

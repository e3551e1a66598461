"""What every probe keeps, whatever it measures."""

import copy
import functools
import json
import math
import os
import random
import traceback
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import _TunerExitException
from small import FunctionalNet, loaders, quiet_trainer, vectors
from stateful import Stateful
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lit_resnorm
import lit_resnorm_callbacks
from lit_resnorm.data import Digits
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import identity, untouched
from lit_resnorm.modules import LitSharedResNet, LitSmoothResNet
from lit_resnorm.quantities import PLACES
from lit_resnorm.runs import RunHistory
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    Cadence,
    FIMEigenvalueProbe,
    GradientCovarianceProbe,
    GradientMonitor,
    HeadroomProbe,
    HessianProbe,
    IterativeInferenceMonitor,
    MomentTracer,
    NormPreservationMonitor,
    StabilityProbe,
)

PROBES = {
    "activation": ActivationRateMonitor,
    "fim": FIMEigenvalueProbe,
    "gradcov": GradientCovarianceProbe,
    "gradients": GradientMonitor,
    "headroom": HeadroomProbe,
    "hessian": HessianProbe,
    "inference": IterativeInferenceMonitor,
    "moments": MomentTracer,
    "norms": NormPreservationMonitor,
    "stability": StabilityProbe,
}
# By themselves these meet the contract in slow tests, and with all other probes at once
# in fast ones: they take many passes, or share what they do around a step.
OF_MANY_PASSES = ("gradcov", "hessian", "inference", "norms")
OF_STEPS = ("gradients", "headroom")
# A headroom is that of a step: the weights that a training ends with have none.
OF_WEIGHTS = {name: probe for name, probe in PROBES.items() if name != "headroom"}


def last(probe, step):
    """The step at a training's end, where a probe measures there."""
    return [step] * (probe in OF_WEIGHTS.values())


def cases_of(probes, slow=(*OF_MANY_PASSES, *OF_STEPS)):
    """Return cases of probes by name."""
    return [
        pytest.param(probe, id=name, marks=[pytest.mark.slow] * (name in slow))
        for name, probe in probes.items()
    ]


every_probe = pytest.mark.parametrize("probe", cases_of(PROBES))
# These need twins, or a step, where the others look at a network alone.
NOT_BY_SITE = ("gradcov", "gradients", "headroom", "hessian", "stability")
BY_SITE = {name: probe for name, probe in PROBES.items() if name not in NOT_BY_SITE}
every_probe_by_site = pytest.mark.parametrize("probe", cases_of(BY_SITE))


def fit(probes, *, steps=20, module=None, num_workers=0, **options):
    L.seed_everything(7, verbose=False)
    module = FunctionalNet() if module is None else module
    trainer = quiet_trainer(max_steps=steps, callbacks=probes, **options)
    trainer.fit(module, *loaders(num_workers=num_workers))
    return trainer, module


def values(trainer, name):
    """Measured values by key; the time taken is not one."""
    return {
        key: value
        for key, value in trainer.callback_metrics.items()
        if key.startswith(f"{name}/") and not key.endswith("/seconds")
    }


class Recorder(L.pytorch.loggers.Logger):
    """A logger that keeps its rows."""

    name = version = "recorder"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def steps(self, prefix):
        return [s for s, row in self.rows if any(k.startswith(prefix) for k in row)]


def random_states():
    return (
        torch.get_rng_state(),
        torch.from_numpy(np.random.get_state()[1].copy()),  # noqa: NPY002
        random.getstate(),
    )


def assert_same_state(one, other):
    flat_one, spec_one = torch.utils._pytree.tree_flatten(one)
    flat_other, spec_other = torch.utils._pytree.tree_flatten(other)
    assert spec_one == spec_other
    for a, b in zip(flat_one, flat_other, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


def training_state(trainer, module):
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "random": random_states(),
        "modes": [m.training for m in module.modules()],
    }


@every_probe
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_training_is_bit_identical_with_and_without_the_probe(probe, options):
    bare = training_state(*fit([], **options))
    probed = training_state(*fit([probe(cadence=3, num_examples=24)], **options))
    assert_same_state(probed, bare)


@every_probe
def test_training_with_bf16_autocast_is_bit_identical_too(probe):
    options = {"precision": "bf16-mixed", "steps": 6}
    bare = training_state(*fit([], **options))
    assert_same_state(training_state(*fit([probe(cadence=2)], **options)), bare)


INFLUENCE = functools.partial(StabilityProbe, method="influence")
OF_TIED = PROBES | {
    "influence": INFLUENCE,
    "products": functools.partial(FIMEigenvalueProbe, num_eigenvalues=1),
}
TIED = {
    "convolutional": lambda: LitSharedResNet(depth=3, width=4, shared=2),
    "smooth": lambda: LitSmoothResNet(4, 16, tied=True),
}


@pytest.mark.parametrize("variant", TIED.values(), ids=TIED)
@pytest.mark.parametrize("probe", cases_of(OF_TIED))
def test_training_of_a_variant_with_shared_layers_is_bit_identical(probe, variant):
    def trained(probes):
        L.seed_everything(7, verbose=False)
        module = variant()
        own = dict(module.named_parameters())
        trainer = quiet_trainer(max_steps=6, callbacks=probes)
        trainer.fit(module, Digits(num_workers=0, batch_size=8))
        assert {n: id(p) for n, p in module.named_parameters()} == {
            n: id(p) for n, p in own.items()
        }
        return trainer, module

    trainer, module = trained([probe(cadence=2, num_examples=24)])
    assert f"{probe().name}/failed" not in values(trainer, probe().name)
    assert_same_state(training_state(trainer, module), training_state(*trained([])))


def stateful_run(probes, *, devices=1, **options):
    """Train a module with every kind of state; return its end, and what was logged."""
    L.seed_everything(7, verbose=False)
    Stateful.passes_of_class = 0
    Stateful.shapes_of_class.clear()
    recorder, module = Recorder(), Stateful(**options)
    shared = torch.Generator().manual_seed(3)
    train = DataLoader(vectors(), 8, shuffle=True, generator=shared)
    strategy = "ddp_fork" if devices > 1 else "auto"
    trainer = quiet_trainer(
        max_steps=10,
        callbacks=probes,
        logger=recorder,
        devices=devices,
        strategy=strategy,
    )
    trainer.fit(module, train, DataLoader(vectors(40, seed=1), 8, generator=shared))
    if devices > 1:
        return module.state_dict(), trainer

    def of_the_run(row):
        return {k: v for k, v in row.items() if k.split("/")[0] not in names}

    names = ["epoch", *(p.name for p in probes)]  # a probe's rows have the epoch too
    rows = [(step, of_the_run(row)) for step, row in recorder.rows]
    state = {
        **training_state(trainer, module),
        "state": module.state(),
        "rows": [(step, row) for step, row in rows if row],
        "logged": of_the_run(trainer.callback_metrics),
    }
    return state, trainer


@pytest.mark.parametrize("probe", cases_of(OF_TIED))
def test_training_of_a_model_with_every_kind_of_state_is_bit_identical(probe):
    # Twins say once that they can't follow weights that something else moves.
    moves = probe is not StabilityProbe
    probes = [probe(cadence=3, num_examples=24)]
    probed, trainer = stateful_run(probes, moves_weights=moves)
    assert f"{probe().name}/failed" not in values(trainer, probe().name)
    assert_same_state(probed, stateful_run([], moves_weights=moves)[0])


@every_probe_by_site
def test_training_of_a_model_whose_state_feeds_its_output_is_bit_identical(probe):
    probed, trainer = stateful_run([probe(cadence=3, num_examples=24)], feeds=True)
    assert f"{probe().name}/failed" not in values(trainer, probe().name)
    assert_same_state(probed, stateful_run([], feeds=True)[0])


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("probe", cases_of(OF_TIED))
def test_training_of_a_stateful_model_on_two_ranks_is_bit_identical(probe):
    probes = [probe(cadence=3, num_examples=5)]
    options = {"devices": 2, "moves_weights": probe is not StabilityProbe}
    probed, bare = stateful_run(probes, **options)[0], stateful_run([], **options)[0]
    assert_same_state(probed, bare)


def all_probes():
    """One probe of every kind and way of measuring, for one run."""
    return [
        probe(name=name, cadence=3, num_examples=24) for name, probe in OF_TIED.items()
    ]


@pytest.mark.ddp
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", TIED.values(), ids=TIED)
def test_shared_layers_train_alike_under_all_probes_at_once(variant, devices):
    def weights(probes):
        L.seed_everything(7, verbose=False)
        module = variant()
        trainer = quiet_trainer(
            max_steps=6,
            callbacks=probes,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            use_distributed_sampler=False,
        )
        trainer.fit(module, Digits(num_workers=0, batch_size=8))
        return module.state_dict(), trainer

    probed, trainer = weights(all_probes())
    for probe in OF_TIED:
        assert values(trainer, probe)
        assert f"{probe}/failed" not in values(trainer, probe)
    assert_same_state(probed, weights([])[0])


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("devices", [1, 2])
def test_every_kind_of_state_is_kept_under_all_probes_at_once(devices):
    options = {"devices": devices, "moves_weights": False}
    probed, trainer = stateful_run(all_probes(), **options)
    assert not [key for key in trainer.callback_metrics if key.endswith("/failed")]
    assert_same_state(probed, stateful_run([], **options)[0])


@pytest.mark.parametrize("probe", cases_of(OF_WEIGHTS))
def test_measure_alone_changes_nothing(probe):
    L.seed_everything(0, verbose=False)
    module = FunctionalNet()
    module.norm.eval()
    module(torch.randn(4, 8)).sum().backward()
    x, y = vectors(16).tensors
    with untouched(module) as run:
        sites = run(lambda: trace(module, lambda: module(x[:2])))
    measuring = probe()
    measuring.prepare(module, sites)

    def state():
        grads = [p.grad for p in module.parameters()]
        modes = [m.training for m in module.modules()]
        return copy.deepcopy((module.state_dict(), grads, modes, random_states()))

    before = state()
    assert measuring.measure(module, (x, y), identity)
    assert_same_state(state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@every_probe
def test_probe_runs_at_the_steps_of_its_cadence_once_each(probe):
    recorder = Recorder()
    fit([probe(cadence=7)], logger=recorder)
    assert recorder.steps(probe().name) == [0, 7, 14, *last(probe, 20)]
    recorder = Recorder()
    only = Cadence(7, at_start=False, at_end=False)
    fit([probe(cadence=only)], logger=recorder)
    assert recorder.steps(probe().name) == [7, 14]


@every_probe
def test_steps_count_optimizer_steps_under_accumulation_and_mid_epoch_validation(probe):
    recorder = Recorder()
    fit(
        [probe(cadence=2)],
        steps=6,
        logger=recorder,
        accumulate_grad_batches=3,
        val_check_interval=2,
    )
    assert recorder.steps(probe().name) == [0, 2, 4, *last(probe, 6)]


class TwoOptimizers(FunctionalNet):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        head, body = [*self.head.parameters()], [*self.first.parameters()]
        return torch.optim.SGD(head, 0.1), torch.optim.SGD(body, 0.1)


def test_with_two_optimizers_steps_count_batches_that_stepped():
    recorder = Recorder()
    probe = ActivationRateMonitor(cadence=2)
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(max_epochs=1, callbacks=[probe], logger=recorder)
    trainer.fit(TwoOptimizers(), *loaders())
    assert trainer.global_step == 16
    assert recorder.steps("activation") == [0, 2, 4, 6, 8]


class Accumulating(TwoOptimizers):
    """Steps in every fourth batch, and counts for itself."""

    taken = 0

    def training_step(self, batch, batch_idx):
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        if (batch_idx + 1) % 4 == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.taken += 1


def test_steps_under_manual_accumulation_are_those_of_the_optimizers():
    seen = []

    class Seen(ActivationRateMonitor):
        def run(self, trainer, module, step):
            seen.append((step, module.taken))
            super().run(trainer, module, step)

    trainer = quiet_trainer(max_epochs=4, callbacks=[Seen(cadence=3)])
    trainer.fit(Accumulating(), *loaders())
    assert seen == [(0, 0), (3, 3), (6, 6), (8, 8)]


@every_probe
def test_resumed_run_repeats_and_misses_no_step(probe, tmp_path):
    whole = Recorder()
    fit([probe(cadence=2)], logger=whole)
    part, rest = Recorder(), Recorder()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=6)
    fit(
        [probe(cadence=Cadence(2, at_end=False)), checkpoint],
        steps=6,
        logger=part,
        enable_checkpointing=True,
    )
    trainer = quiet_trainer(max_steps=20, callbacks=[probe(cadence=2)], logger=rest)
    trainer.fit(FunctionalNet(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    name = probe().name
    assert part.steps(name) + rest.steps(name) == whole.steps(name)


@every_probe
def test_two_probes_of_a_kind_keep_apart(probe):
    pair = [probe(name="one", cadence=5), probe(name="two", num_examples=8)]
    trainer, _ = fit(pair, steps=5)
    one, two = values(trainer, "one"), values(trainer, "two")
    assert one
    assert {k.removeprefix("one") for k in one} == {k.removeprefix("two") for k in two}


def test_two_probes_of_one_name_are_refused_with_the_name():
    class Other(ActivationRateMonitor):
        pass

    with pytest.raises(ValueError, match="'activation'"):
        fit([ActivationRateMonitor(), Other()])


@every_probe
def test_values_on_a_healthy_net_are_finite_and_can_be_watched(probe):
    trainer, _ = fit([probe()])
    measured = values(trainer, probe().name)
    assert measured
    assert all(math.isfinite(value) for value in measured.values())
    watch = EarlyStopping(
        next(iter(measured)), patience=100, check_on_train_epoch_end=True
    )
    assert fit([probe(cadence=2), watch])[0].global_step == 20


@every_probe_by_site
def test_probe_works_from_validate_and_test_under_inference_mode(probe):
    for run in ("validate", "test"):
        recorder = Recorder()
        trainer = quiet_trainer(callbacks=[probe()], logger=recorder)
        getattr(trainer, run)(FunctionalNet(), loaders()[1], verbose=False)
        assert recorder.steps(probe().name) == [0]
        assert all(math.isfinite(v) for v in values(trainer, probe().name).values())


@pytest.mark.parametrize("probe", cases_of(OF_WEIGHTS))
def test_testing_the_trained_weights_measures_them_once_and_changed_ones_again(probe):
    recorder = Recorder()
    trainer, module = fit([probe(cadence=20)], logger=recorder)
    trainer.test(module, loaders()[1], verbose=False)
    assert recorder.steps(probe().name) == [0, 20]
    with torch.no_grad():
        module.head.weight.mul_(2)
    trainer.test(module, loaders()[1], verbose=False)
    assert recorder.steps(probe().name) == [0, 20, 20]


@every_probe
def test_sanity_check_measures_nothing(probe):
    recorder = Recorder()
    fit([probe(cadence=Cadence(100, False, False))], logger=recorder, steps=2)
    assert recorder.steps(probe().name) == []


@every_probe
def test_fast_dev_run_measures_once(probe):
    counted = []

    class Counted(probe):
        def measure(self, *args):
            counted.append(1)
            return super().measure(*args)

    fit([Counted(cadence=1)], fast_dev_run=3)
    assert len(counted) == 1


@every_probe
def test_csv_logger_keeps_every_row(probe, tmp_path):
    fit([probe(cadence=5)], logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    header, *rows = (line.split(",") for line in text.splitlines())
    column = next(i for i, key in enumerate(header) if key == f"{probe().name}/seconds")
    assert sum(bool(row[column]) for row in rows) == 4 + len(last(probe, 20))


@every_probe_by_site
def test_torchvision_resnet_is_measured_as_it_is(probe):
    class Resnet(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.net = torchvision.models.resnet18(num_classes=3)

        def forward(self, x):
            return self.net(x)

    images = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
    trainer = quiet_trainer(callbacks=[probe()])
    trainer.validate(Resnet(), DataLoader(images, 6), verbose=False)
    measured = values(trainer, probe().name)
    assert any("net.layer4.1." in key for key in measured)
    assert f"{probe().name}/failed" not in measured


@every_probe
def test_dict_batches_reach_forward_by_the_names_of_its_parameters(probe):
    class Dicts(FunctionalNet):
        def forward(self, x, scale=None):
            return super().forward(x if scale is None else x * scale)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["x"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            pass

    rows = [{"x": x, "label": y} for x, y in vectors()]
    trainer = quiet_trainer(max_steps=2, callbacks=[probe()])
    trainer.fit(Dicts(), DataLoader(rows, 8), DataLoader(rows, 8))
    assert f"{probe().name}/failed" not in values(trainer, probe().name)
    assert values(trainer, probe().name)


class Block(nn.Module):
    """A residual block with its activation."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        return x + self.branch(x)


@every_probe_by_site
def test_compiled_modules_are_measured_in_their_eager_form(probe):
    class Compiled(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(Block(), backend="eager")

        def forward(self, x):
            return super().forward(self.inner(x))

    trainer, _ = fit([probe(cadence=2)], steps=4, module=Compiled())
    measured = values(trainer, probe().name)
    assert any(".inner." in key for key in measured)
    assert not any("_orig_mod" in key for key in measured)


OURS = tuple(
    os.path.dirname(package.__file__)
    for package in (lit_resnorm, lit_resnorm_callbacks)
)
COMPILED_PASSES = []
"""Of each call of compiled code, whether something of ours made it."""


def noted(graph, inputs):
    """Compile by running as it is, and note who calls."""
    del inputs

    def call(*args):
        files = [frame.filename for frame in traceback.extract_stack()]
        COMPILED_PASSES.append(any(file.startswith(OURS) for file in files))
        return graph(*args)

    return call


class CallsACompiledFunction(FunctionalNet):
    relu = staticmethod(torch.compile(F.relu, backend=noted))

    def forward(self, x):
        return super().forward(self.relu(x))


COMPILED = {
    "module of Lightning": lambda: torch.compile(FunctionalNet(), backend=noted),
    "function": CallsACompiledFunction,
}


# Dynamo's, where it traces `self.log`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# Dynamo takes seconds a case.
@pytest.mark.parametrize("probe", cases_of(PROBES, slow=PROBES.keys() - {"activation"}))
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_passes_of_probes_run_nothing_that_is_compiled(probe, make):
    def run(probes):
        torch.compiler.reset()
        COMPILED_PASSES.clear()
        L.seed_everything(7, verbose=False)
        trainer, module = fit(probes, steps=4, module=make())
        assert COMPILED_PASSES
        return training_state(trainer, module)

    probed = run([probe(cadence=2, num_examples=24)])
    assert not any(COMPILED_PASSES)
    assert_same_state(probed, run([]))


@pytest.mark.filterwarnings("ignore:inference. the cosine at .* is NaN:UserWarning")
@pytest.mark.filterwarnings("ignore:norms. .* are NaN:UserWarning")
@every_probe
def test_nan_weights_are_logged_as_nan_and_training_goes_on(probe):
    class Poisoned(FunctionalNet):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                with torch.no_grad():
                    self.first.weight.fill_(torch.nan)

    trainer, _ = fit([probe(cadence=2)], steps=8, module=Poisoned())
    assert trainer.global_step == 8
    assert any(math.isnan(value) for value in values(trainer, probe().name).values())


class Failing(ActivationRateMonitor):
    """Fails at the second measurement, on the last rank, after one sum."""

    def __init__(self, error=None, **options):
        super().__init__(cadence=2, **options)
        self.error = error or RuntimeError("no such kernel")
        self.tries = 0

    def measure(self, module, batch, reduce):
        self.tries += 1
        reduce(torch.ones(1))
        if self.tries > 1 and module.global_rank == module.trainer.world_size - 1:
            raise self.error
        return super().measure(module, batch, reduce)


def test_failing_measurement_is_logged_as_nan_with_one_warning_that_says_why():
    with pytest.warns(UserWarning, match="no such kernel") as warned:
        trainer, _ = fit([Failing()], steps=6)
    assert sum("no such kernel" in str(w.message) for w in warned) == 1
    measured = values(trainer, "activation")
    assert measured.pop("activation/failed") == 1
    assert measured
    assert all(math.isnan(value) for value in measured.values())


RUN_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
    "state_dict",
    "on_save_checkpoint",
    "on_fit_start",
    "prepare",
    "measure",
    "figures",
    "run",
)


def planted(probe, name):
    """A subclass, as of another package, whose method of this name fails."""

    def fails(self, *args, **kwargs):
        raise RuntimeError("planted")

    return type(probe.__name__, (probe,), {name: fails})


@every_probe
@pytest.mark.parametrize("hook", RUN_HOOKS)
def test_no_hook_that_fails_ends_or_changes_a_run(probe, hook, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    failing = planted(probe, hook)(cadence=2, num_examples=8)
    with pytest.warns(UserWarning, match="planted") as warned:
        trainer, module = fit(
            [failing, checkpoint],
            steps=5,
            logger=RunHistory(tmp_path),
            enable_checkpointing=True,
        )
    bare = training_state(*fit([], steps=5))
    assert_same_state(training_state(trainer, module), bare)
    assert sum("planted" in str(each.message) for each in warned) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "finished"


class Refusing(Recorder):
    """A logger whose method of one name fails."""

    def __init__(self, name):
        super().__init__()
        setattr(self, name, self.fails)

    def log_table(self, key, *, columns, data, step):
        pass

    def log_image(self, key, images, step):
        pass

    def fails(self, *args, **kwargs):
        raise BrokenPipeError("planted")


@every_probe
@pytest.mark.parametrize("method", ["log_table", "log_image"])
def test_a_logger_that_takes_no_table_or_image_costs_the_others_nothing(probe, method):
    other = Recorder()
    loggers = [Refusing(method), other]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer, module = fit([probe(cadence=3)], steps=7, logger=loggers)
    assert sum("planted" in str(each.message) for each in warned) <= 1
    assert other.steps(probe().name) == [0, 3, 6, *last(probe, 7)]
    assert_same_state(
        training_state(trainer, module), training_state(*fit([], steps=7))
    )


def test_values_reach_other_loggers_where_one_takes_none():
    class Down(Recorder):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("activation") for key in metrics):
                raise ConnectionResetError("planted")

    other = Recorder()
    with pytest.warns(UserWarning, match="planted") as warned:
        fit([ActivationRateMonitor(cadence=3)], steps=6, logger=[Down(), other])
    assert other.steps("activation") == [0, 3, 6]
    assert sum("planted" in str(each.message) for each in warned) == 1


def test_strict_raises_what_any_hook_raised():
    failing = planted(ActivationRateMonitor, "on_train_batch_end")
    with pytest.raises(RuntimeError, match="planted"):
        fit([failing(strict=True)], steps=3)


def test_a_hook_that_fails_leaves_nan_and_no_later_number():
    failing = planted(ActivationRateMonitor, "on_before_optimizer_step")
    with pytest.warns(UserWarning, match="planted"):
        trainer, _ = fit([failing(cadence=2)], steps=6)
    measured = values(trainer, "activation")
    assert measured.pop("activation/failed") == 1
    assert all(math.isnan(value) for value in measured.values())


def test_a_hook_put_on_an_instance_or_by_a_mixin_is_guarded_too():
    class Mixin(L.Callback):
        def on_train_epoch_start(self, *_):
            raise RuntimeError("planted")

    class Mixed(Mixin, ActivationRateMonitor):
        pass

    patched = ActivationRateMonitor(name="other")
    patched.on_train_epoch_start = planted(ActivationRateMonitor, "x").x.__get__(
        patched
    )
    with pytest.warns(UserWarning, match="planted") as warned:
        trainer, _ = fit([Mixed(), patched], steps=3)
    assert trainer.global_step == 3
    assert sum("planted" in str(each.message) for each in warned) == 2


def test_keyboard_interrupts_and_the_tuners_own_exception_pass():
    class Stops(ActivationRateMonitor):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit([Stops()], steps=3)

    class Tuned(ActivationRateMonitor):
        def on_fit_start(self, *_):
            raise _TunerExitException

    trainer, _ = fit([Tuned()], steps=3)
    assert trainer.global_step == 0


def test_a_refusal_before_the_first_step_names_the_probe():
    class Refuses(ActivationRateMonitor):
        def on_before_backward(self, *_):
            raise ValueError("the loss is another one")

    with pytest.raises(ValueError, match="activation: the loss is another one"):
        fit([Refuses()], steps=3)

    class Late(ActivationRateMonitor):
        def on_before_backward(self, trainer, *_):
            if trainer.global_step:
                raise ValueError("the loss is another one")

    with pytest.warns(UserWarning, match="the loss is another one"):
        assert fit([Late()], steps=3)[0].global_step == 3


@every_probe
@pytest.mark.parametrize("state", [{}, {"last_step": 3, "records": 7}, {"x": 1}])
def test_a_damaged_state_is_a_warning_and_the_probe_begins_anew(probe, state):
    fresh = probe(cadence=2)
    with pytest.warns(UserWarning, match="load_state_dict failed"):
        fresh.load_state_dict(state)
    recorder = Recorder()
    fit([fresh], steps=4, logger=recorder)
    assert recorder.steps(probe().name) == [0, 2, *last(probe, 4)]


class NoForward(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.n = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return self.n.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class TwoInputs(NoForward):
    def forward(self, a, b):
        return self.n(a) + self.n(b)


class ByKeyword(NoForward):
    def forward(self, *, x):
        return self.n(x)


class OtherShape(NoForward):
    def forward(self, x):
        return self.n(x[:, :4])


@every_probe
@pytest.mark.parametrize("module", [NoForward, TwoInputs, ByKeyword, OtherShape])
def test_a_model_that_cannot_be_run_is_refused_with_probe_reason_and_option(
    probe, module
):
    trainer = quiet_trainer(max_steps=1, callbacks=[probe()])
    message = f"^{probe().name}: .*(Error|Exception).*forward_fn"
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(), *loaders())
    assert trainer.global_step == 0


def test_a_probe_batch_that_cannot_be_read_is_refused_with_probe_and_option():
    class Missing(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise FileNotFoundError("no such image")

    probe = ActivationRateMonitor(dataloader=DataLoader(Missing(), 4))
    with pytest.raises(ValueError, match=r"^activation: .*no such image.*dataloader="):
        fit([probe])


@every_probe_by_site
@pytest.mark.parametrize("change", ["buffers", "data", "swap"])
def test_a_test_measures_again_what_differs_in_value_and_only_that(probe, change):
    recorder = Recorder()
    trainer, module = fit([probe(cadence=20, norm_mode="eval")], logger=recorder)
    kept = copy.deepcopy(module.state_dict())
    if change == "buffers":
        module.norm.running_mean.add_(1)
    elif change == "data":
        module.head.weight.data = module.head.weight.data * 0.5
    else:
        module.load_state_dict({key: value * 2 for key, value in kept.items()})
    loader = loaders()[1]
    trainer.test(module, loader, verbose=False)
    assert recorder.steps(probe().name) == [0, 20, 20]
    # an average that was swapped in and out again leaves other version counters
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    trainer.test(module, loader, verbose=False)
    assert recorder.steps(probe().name) == [0, 20, 20]


def test_strict_raises_what_the_measurement_raised():
    with pytest.raises(RuntimeError, match="no such kernel"):
        fit([Failing(strict=True)], steps=6)


def test_running_out_of_memory_tries_smaller_first():
    class Shrinking(Failing):
        chunk = 4

        def smaller(self):
            self.chunk //= 2
            if self.chunk == 1:
                self.tries = -100
            return self.chunk > 0

    probe = Shrinking(error=torch.OutOfMemoryError("out of memory"))
    trainer, _ = fit([probe], steps=2)
    assert probe.chunk == 1
    assert "activation/failed" not in values(trainer, "activation")


def validated(probes, devices, num_examples=None):
    """Values of probes on an untrained net, on so many processes."""
    L.seed_everything(3, verbose=False)
    module = FunctionalNet()
    strategy = "ddp_fork" if devices > 1 else "auto"
    trainer = quiet_trainer(devices=devices, strategy=strategy, callbacks=probes)
    trainer.validate(module, loaders()[1], verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.ddp
@every_probe_by_site
@pytest.mark.parametrize("num_examples", [7, 1])
@pytest.mark.parametrize("norm_mode", ["frozen", "eval"])
def test_two_ranks_with_uneven_or_empty_shards_equal_one(
    probe, num_examples, norm_mode
):
    def measured(devices):
        probes = [probe(num_examples=num_examples, norm_mode=norm_mode)]
        found = validated(probes, devices)
        return {k: v for k, v in found.items() if "/" in k and "seconds" not in k}

    one, two = measured(1), measured(2)
    assert one
    assert one.keys() == two.keys()
    for key, value in one.items():
        # means of cosines may cancel: their rounding is that of numbers up to 1
        least = 1e-6 if "/cosine/" in key else 1e-9
        assert two[key] == pytest.approx(value, rel=1e-6, abs=least, nan_ok=True), key


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:activation. nothing was measured:UserWarning")
def test_failure_on_one_rank_leaves_none_waiting():
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(
        max_steps=4, devices=2, strategy="ddp_fork", callbacks=[Failing()]
    )
    trainer.fit(FunctionalNet(), *loaders())
    assert trainer.callback_metrics["activation/failed"] == 1


@pytest.mark.ddp
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "prepare", "run"]
)
def test_a_hook_that_fails_on_one_rank_leaves_none_waiting(hook):
    class OnOne(ActivationRateMonitor):
        pass

    def fails(self, *args, **kwargs):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("planted")
        return getattr(ActivationRateMonitor, hook)(self, *args, **kwargs)

    setattr(OnOne, hook, fails)

    def weights(probes):
        L.seed_everything(7, verbose=False)
        module = FunctionalNet()
        trainer = quiet_trainer(
            max_steps=4, devices=2, strategy="ddp_fork", callbacks=probes
        )
        trainer.fit(module, *loaders())
        return module.state_dict()

    # the warning is rank 0's, in another process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = weights([OnOne(cadence=2, num_examples=5)])
    assert_same_state(found, weights([]))


@pytest.mark.ddp
@every_probe
def test_training_on_two_ranks_is_bit_identical_with_and_without_the_probe(probe):
    def weights(probes):
        L.seed_everything(7, verbose=False)
        module = FunctionalNet()
        trainer = quiet_trainer(
            max_steps=6, devices=2, strategy="ddp_fork", callbacks=probes
        )
        trainer.fit(module, *loaders())
        return module.state_dict()

    assert_same_state(weights([probe(cadence=2, num_examples=5)]), weights([]))


class ManySites(ActivationRateMonitor):
    """Logs more than a pipe takes."""

    def measure(self, module, batch, reduce):
        return {
            "rate_mean": torch.ones(()),
            **{f"rate/{i:04d}.layer": torch.ones(()) for i in range(2000)},
        }


@pytest.mark.ddp
def test_a_run_on_two_ranks_ends_whatever_number_of_values_it_logs():
    trainer = quiet_trainer(
        max_steps=2, devices=2, strategy="ddp_fork", callbacks=[ManySites()]
    )
    trainer.fit(FunctionalNet(), *loaders())
    assert trainer.callback_metrics["activation/rate_mean"] == 1
    assert "activation/rate/0000.layer" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cadence": 0}, "cadence is 0"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"norm_mode": "frosty"}, "norm_mode is 'frosty'.*frozen, eval, train"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"log": "some"}, "log is 'some'.*scalars, summary, all"),
        ({"batch": torch.ones(1), "dataloader": []}, "batch and dataloader"),
    ],
)
@every_probe
def test_options_that_cannot_be_right_are_refused_by_value(probe, options, message):
    with pytest.raises(ValueError, match=message):
        probe(**options)


@every_probe
def test_a_probe_logs_at_most_40_scalars_by_default(probe):
    number = 0
    for one in probe().declared().values():
        quantity = one.quantity
        if quantity.detail or quantity.form != "value":
            continue
        # a name such as `top/<rank>` stands for ten
        each = 10 if one.pattern else 1
        number += len(PLACES) if quantity.by_site else each
    assert number <= 40


def test_pattern_that_matches_nothing_is_told_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'nope'.*002\.relu, 004\.relu"):
        fit([ActivationRateMonitor(sites="nope")])


def test_project_without_a_validation_loader_is_told_what_to_give():
    trainer = quiet_trainer(max_steps=1, callbacks=[ActivationRateMonitor()])
    with pytest.raises(ValueError, match="give the probe batch= or dataloader="):
        trainer.fit(FunctionalNet(), loaders()[0])


def test_probe_batch_given_by_hand_is_the_one_that_is_measured():
    x = torch.randn(5, 8)
    recorder = Recorder()  # some versions keep callback_metrics in float32
    probe = ActivationRateMonitor(batch=(x,), sites="004", norm_mode="eval")
    _, module = fit([probe], steps=2, logger=recorder)
    module.eval()
    u = module.second(nn.functional.relu(module.norm(module.first(x))))
    key = "activation/rate/last"
    *_, rate = [row[key] for _, row in recorder.rows if key in row]
    assert rate == pytest.approx((u > 0).double().mean().item(), abs=1e-12)


def test_shuffling_loader_gives_the_same_probe_batch_each_time():
    shuffled = DataLoader(vectors(), 8, shuffle=True)
    first, second = (
        validated([ActivationRateMonitor(dataloader=shuffled, num_examples=16)], 1)
        for _ in range(2)
    )
    first.pop("activation/seconds"), second.pop("activation/seconds")
    assert first == second

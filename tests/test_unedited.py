"""Probes in scripts that nobody edits: what the variable says, what they do."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import lightning as L
import pytest
import torch
from small import FunctionalNet, loaders, quiet_trainer
from test_probe_contract import TwoOptimizers, assert_same_state, training_state
from torch.nn import functional as F

from lit_resnorm.unedited import VARIABLE, probes_for_trainer
from lit_resnorm_callbacks import ActivationRateMonitor, GradientMonitor, HeadroomProbe

ROOT = Path(__file__).parents[1]


def asked(monkeypatch, value):
    """The callbacks that a Trainer gets, while the variable has a value."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, value)
        return probes_for_trainer()


def test_without_the_variable_there_are_none_and_nothing_is_imported():
    code = (
        "import sys; from lit_resnorm.unedited import probes_for_trainer as asked;"
        "assert asked() == [];"
        "assert not {'torch', 'lightning', 'yaml', 'numpy'} & {*sys.modules}"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'callbacks'}", VARIABLE: " "}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lightning.pytorch.callbacks_factory"] == {
        "lit-resnorm": f"{probes_for_trainer.__module__}:{probes_for_trainer.__name__}"
    }


def test_names_with_literal_options_make_probes(monkeypatch):
    text = "ActivationRateMonitor, GradientMonitor(cadence=50, name='a b'.strip)"
    assert asked(monkeypatch, text) == []
    text = (
        "ActivationRateMonitor  GradientMonitor(cadence={'every_n_steps': 50,"
        " 'at_end': False}, sites='(a, b)', noise_cadence=None)"
    )
    _, rates, gradients = asked(monkeypatch, text)
    assert isinstance(rates, ActivationRateMonitor)
    assert isinstance(gradients, GradientMonitor)
    assert gradients.cadence.every_n_steps == 50
    assert (gradients.sites, gradients.noise_cadence) == ("(a, b)", None)


def test_a_config_of_callbacks_names_them_too(monkeypatch, tmp_path):
    found = asked(monkeypatch, str(ROOT / "configs/callbacks/quick.yaml"))
    kinds = [type(probe) for probe in found[1:]]
    assert kinds == [ActivationRateMonitor, GradientMonitor, HeadroomProbe]
    path = tmp_path / "own.yaml"
    path.write_text("- HeadroomProbe\n- {class_path: GradientMonitor, init_args: {}}\n")
    kinds = [type(probe) for probe in asked(monkeypatch, str(path))[1:]]
    assert kinds == [HeadroomProbe, GradientMonitor]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("GradientMonitr", "no probe 'GradientMonitr'; did you mean GradientMonitor"),
        ("os.system('true')", "no name with options in brackets"),
        ("Probe", "there is no probe 'Probe'"),
        ("GradientMonitor(cadenc=3)", "no option 'cadenc'; did you mean cadence"),
        ("GradientMonitor(cadence=0)", "cadence is 0"),
        ("GradientMonitor(50)", "options are written name=value"),
        ("GradientMonitor(**{})", "options are written name=value"),
        ("GradientMonitor(cadence=__import__('os').getpid())", "give a number"),
        ("GradientMonitor(cadence=", "no name with options in brackets"),
        (",", "names no probe"),
        ("nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_no_probes(value, says, monkeypatch, capsys):
    assert asked(monkeypatch, value) == []
    line = capsys.readouterr().err
    assert line.startswith(f"{VARIABLE}: ")
    assert says in line
    assert line.endswith("the script runs on without probes\n")
    assert line.count("\n") == 1


class Reshaping(FunctionalNet):
    """Takes its batches apart in `training_step`; `forward` takes none of them."""

    def forward(self, x, *, is_ready=None):
        assert is_ready
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", 0.0)
        return F.cross_entropy(self(x.flatten(1), is_ready=True), y)


def test_a_network_that_takes_no_batch_is_run_by_its_training_step(
    monkeypatch, tmp_path
):
    trainer, _ = script(asked(monkeypatch, ALL), tmp_path, module=Reshaping())
    found = trainer.callback_metrics
    assert 0 < found["activation/rate/002.relu"] < 1
    assert found["gradients/norm/000.first"] > 0
    assert found["headroom/step"] >= 0
    assert not [key for key in found if "noise" in key or key.endswith("/failed")]


class Adversarial(TwoOptimizers):
    """Trains by losses of its own, and returns none."""

    def forward(self, x):
        return super().forward(x).mean()

    def training_step(self, batch, batch_idx):
        self.manual_backward(self(batch[0]))
        for optimizer in self.optimizers():
            optimizer.step()


# without tables and figures
ALL = " ".join(
    f"{name}(cadence=2, log='scalars')"
    for name in ("ActivationRateMonitor", "GradientMonitor", "HeadroomProbe")
)


def script(callbacks, folder, *, module=None):
    """What a script does that has neither a logger nor a validation loader."""
    L.seed_everything(7, verbose=False)
    module = module or FunctionalNet()
    trainer = quiet_trainer(max_steps=4, callbacks=callbacks, default_root_dir=folder)
    trainer.fit(module, loaders()[0])
    return trainer, module


def test_a_script_without_logger_gets_a_directory_that_is_named(
    monkeypatch, tmp_path, capsys
):
    trainer, module = script(asked(monkeypatch, ALL), tmp_path)
    (path,) = (tmp_path / "runs/unedited").iterdir()
    assert f"probes wrote {path}" in capsys.readouterr().err
    assert json.loads((path / "summary.json").read_text())["status"] == "finished"
    rows = map(json.loads, (path / "history.jsonl").read_text().splitlines())
    keys = {key for row in rows for key in row}
    wanted = ("gradients/norm", "headroom/step", "activation/rate_mean")
    assert keys >= {*wanted}
    assert trainer.loggers == []
    bare = training_state(*script([], tmp_path))
    assert_same_state(training_state(trainer, module), bare)


def test_checkpoints_of_the_script_hold_nothing_of_the_probes(monkeypatch, tmp_path):
    trainer, _ = script(asked(monkeypatch, ALL), tmp_path)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert not [key for key in saved["callbacks"] if "Monitor" in key or "Probe" in key]


@pytest.mark.parametrize(
    ("module", "value", "says"),
    [
        (
            Adversarial,
            "HeadroomProbe",
            "headroom: nothing is measured: there is no loss",
        ),
        (FunctionalNet, "ActivationRateMonitor(sites='x')", "sites is 'x'"),
    ],
)
def test_what_elsewhere_is_refused_is_a_warning_and_the_script_runs_on(
    module, value, says, monkeypatch, tmp_path
):
    callbacks = asked(monkeypatch, value)
    with pytest.warns(UserWarning, match=says) as warned:
        trainer, _ = script(callbacks, tmp_path, module=module())
    assert trainer.fit_loop.epoch_loop.total_batch_idx > 0
    assert sum(says in str(each.message) for each in warned) == 1

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from offline import complete

from lit_resnorm.cli import main
from lit_resnorm.cli.checks import check_callback_names
from lit_resnorm.runs.files import read_run
from lit_resnorm.runs.wandb_offline import read_offline_wandb

ROOT = Path(__file__).resolve().parents[1]
NET = ["--model", "LitResNetBN", "--model.depth", "2", "--model.width", "8"]
PLAIN = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
    *("--data.num_train", "60", "--data.batch_size", "20"),
]
FIT = ["fit", *NET, *PLAIN, "--trainer.logger", "RunHistory"]
MONITOR = ["--trainer.callbacks+=ActivationRateMonitor"]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def runs(experiment="LitResNetBN"):
    return sorted(Path("runs", experiment).iterdir())


def error_of(capsys, args, status=2):
    """Run a command that has to fail, and return its one line."""
    assert main(args) == status
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if "error" in line]
    assert "Traceback" not in text
    assert len(lines) == 1
    assert lines[0].startswith("lit-resnorm: error: ")
    return lines[0]


BAD = {
    "no command": ([], "fit, validate, test, predict, compare, diagnose, reproduce"),
    "unknown command": (["fitt"], "no command 'fitt'.*did you mean fit"),
    "misspelt command": (["comapre", "x"], "'comapre'.*diagnose.*did you mean compare"),
    "negative rate": (
        [*FIT, "--model.optimizer.lr", "-1"],
        "--model.optimizer.*Invalid learning rate: -1",
    ),
    "no model": (["fit"], "--model is missing"),
    "depth 0": ([*FIT, "--model.depth", "0"], "depth.*0"),
    "negative depth": ([*FIT, "--model.depth=-3"], "depth.*-3"),
    "depth a word": ([*FIT, "--model.depth", "deep"], "model.depth.*'deep'"),
    "width 0": ([*FIT, "--model.width", "0"], "width.*0"),
    "variant": (["fit", "--model", "LitResNetB"], "--model.*LitResNetB'.*LitResNetBN"),
    "callback": ([*FIT, "--trainer.callbacks+=NoProbe"], "callbacks.*NoProbe"),
    "data set": ([*FIT, "--data", "NIST"], "--data: unknown class 'NIST'.*MNIST"),
    "loss": ([*FIT, "--model.loss", "hinge"], "loss.*hinge"),
    "norm_mode": (
        [*FIT, *MONITOR, "--trainer.callbacks.norm_mode", "warm"],
        "norm_mode.*warm.*frozen",
    ),
    "a head too small for mse": (
        [*FIT, "--model.loss", "mse", "--model.num_classes", "5"],
        "loss=mse.*5 outputs.*10 classes",
    ),
    "a head too small": ([*FIT, "--model.num_classes", "5"], "5 outputs.*10 classes"),
    "another input shape": (
        [*FIT, "--model.in_shape", "[1,9,9]"],
        r"Digits, of shape \(1, 8, 8\)",
    ),
    "no class": ([*FIT, "--data.classes", "[]"], "classes.*empty"),
    "cadence 0": (
        [*FIT, *MONITOR, "--trainer.callbacks.cadence", "0"],
        "cadence.*0",
    ),
    "two of a name": (
        [*FIT, *MONITOR, *MONITOR],
        "trainer.callbacks: two ActivationRateMonitor have the name 'activation'",
    ),
    "optimizer": ([*FIT, "--model.optimizer", "Dada"], "model.optimizer.*Dada"),
    "unknown option": ([*FIT, "--depth", "3"], "--depth; did you mean --model.depth"),
    "unknown option of the model": ([*FIT, "--model.dept", "3"], "model.*dept"),
    "trainer option": ([*FIT, "--trainer.max_epochs", "x"], "max_epochs.*'x'"),
    "no config": (["fit", "--config", "no.yaml"], "--config no.yaml: No such file"),
    "no checkpoint": ([*FIT, "--ckpt_path", "no.ckpt"], "--ckpt_path no.ckpt.*no such"),
    "nothing to go on with": ([*FIT, "--ckpt_path", "last"], "--ckpt_path last"),
    "no run of that name": (
        ["test", *FIT[1:], "--ckpt_path", "last", "--run", "x"],
        "--run x: there is no run",
    ),
    "no run of that name whose best is meant": (
        [*FIT, "--ckpt_path", "best", "--run", "x"],
        "--run x: there is no run",
    ),
    "run that leads elsewhere": ([*FIT, "--run", "../x"], r"--run is '\.\./x'"),
    "run with a line break": ([*FIT, "--run", "a\nb"], r"--run is 'a\\nb'"),
    "empty run": ([*FIT, "--run", ""], "--run is ''"),
    "experiment with a slash": ([*FIT, "--experiment", "a/b"], "--experiment is 'a/b'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_use_is_one_line_that_names_option_and_value(capsys, case):
    args, expected = BAD[case]
    assert re.search(expected, error_of(capsys, args))
    assert not Path("runs").exists()


# what probes tell at their set-up
PROBES = {
    "sites": ("FIMEigenvalueProbe", "sites=none", "fim: no layer matches 'none'"),
    "twins": ("StabilityProbe", "num_twins=99", "num_twins is 99, and .* holds 60"),
}


@pytest.mark.parametrize("case", PROBES)
def test_wrong_use_of_a_probe_is_told_before_the_first_batch(capsys, case):
    probe, option, expected = PROBES[case]
    added = f"--trainer.callbacks+={probe}", f"--trainer.callbacks.{option}"
    assert re.search(expected, error_of(capsys, [*FIT, *added]))
    assert not Path("runs").exists()


# what can be told when the data are there
FAILING = {
    "no data root": (["--data", "MNIST", "--data.root", "nowhere"], "root.*nowhere"),
    "num_train": (["--data.num_train", "5000"], "num_train 5000.*1294"),
    "a head too large": (["--model.num_classes", "12"], "num_classes=12.*10"),
}


@pytest.mark.parametrize("case", FAILING)
def test_data_that_cannot_be_had_fails_in_one_line_and_leaves_no_run(capsys, case):
    args, expected = FAILING[case]
    line = error_of(capsys, ["fit", *NET, *PLAIN, *args])
    assert re.search(expected, line)
    assert not Path("runs").exists()


def test_damaged_data_files_fail_in_one_line(capsys, tmp_path):
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for part, kinds in (("train", "60k"), ("t10k", "10k")):
        del kinds
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (folder / f"{part}-{name}").write_bytes(b"\x00\x00\x08\x03\x00")
    args = ["--data", "MNIST", "--data.root", str(tmp_path / "data")]
    plain = [word for word in PLAIN if "data" not in word and word not in ("60", "20")]
    line = error_of(capsys, ["fit", *NET, *plain, *args])
    assert str(tmp_path / "data") in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_named(capsys):
    args = [*FIT, "--trainer.accelerator", "gpu", "--trainer.devices", "2"]
    expected = "trainer.accelerator=gpu, trainer.devices=2: this machine has no GPU"
    assert expected in error_of(capsys, args)


_DEEP = "a: " + "[" * 5000
_SELF = "a: &a [*a]"
_GROWS = "a0: &a0 [x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(40)
)


@pytest.mark.parametrize("text", ["a: [\n", "", "- 1\n", "\x00", _DEEP, _SELF, _GROWS])
def test_a_config_file_that_is_no_mapping_is_named(capsys, text):
    Path("bad.yaml").write_text(text)
    assert "--config bad.yaml: " in error_of(capsys, ["fit", "--config", "bad.yaml"])


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_refused(capsys):
    assert main([*FIT, "--run", "a"]) == 0
    last = Path("runs/LitResNetBN/a/checkpoints/last.ckpt")
    other = ["fit", "--model", "LitMLP", *NET[2:], *PLAIN, "--ckpt_path", str(last)]
    assert re.search("of LitResNetBN, the model is LitMLP", error_of(capsys, other))
    deeper = [*FIT, "--model.depth", "3", "--ckpt_path", str(last)]
    assert "checkpoint has no net.blocks.2" in error_of(capsys, deeper)
    whole = last.read_bytes()
    for name, content in {
        "truncated.ckpt": whole[: len(whole) // 2],
        "empty.ckpt": b"",
        "text.ckpt": b"hello",
    }.items():
        Path(name).write_bytes(content)
        line = error_of(capsys, [*FIT, "--ckpt_path", name])
        assert f"--ckpt_path {name}: it is truncated, or no checkpoint" in line
    assert [path.name for path in runs()] == ["a"]


def test_a_checkpoint_that_could_run_code_is_refused_until_asked_for(capsys):
    class Odd:
        pass

    Odd.__qualname__ = "Path"
    torch.save({"state_dict": {}, "x": Path("x")}, "odd.ckpt", pickle_module=pickle)
    assert "--weights_only false" in error_of(capsys, [*FIT, "--ckpt_path", "odd.ckpt"])


def test_resume_passes_over_a_checkpoint_that_a_kill_cut_short(capsys):
    assert main([*FIT, "--run", "a"]) == 0
    folder = Path("runs/LitResNetBN/a/checkpoints")
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "epoch=1-step=6.ckpt").write_bytes(whole[:1000])
    more = [*FIT, "--trainer.max_epochs", "2", "--ckpt_path", "last"]
    assert main(more) == 0
    assert "step=3.ckpt" in capsys.readouterr().err or runs()
    assert read_run("runs/LitResNetBN/a").history["step"].max() == 6


def test_two_callbacks_without_state_may_share_a_class():
    class Silent(Callback):
        pass

    check_callback_names([Silent(), Silent()])


def test_a_second_run_gets_its_own_directory_and_a_taken_name_is_refused(capsys):
    assert main([*FIT, "--run", "a"]) == 0
    before = Path("runs/LitResNetBN/a/history.jsonl").read_bytes()
    assert main(FIT) == 0
    assert main(FIT) == 0
    assert len(runs()) == 3
    assert "--run a: " in error_of(capsys, [*FIT, "--run", "a"])
    assert Path("runs/LitResNetBN/a/history.jsonl").read_bytes() == before


def test_the_experiment_is_named_by_the_first_config_or_the_option():
    Path("one.yaml").write_text("trainer: {max_epochs: 1}\n")
    Path("two.yaml").write_text("trainer: {log_every_n_steps: 1}\n")
    files = ["--config", "one.yaml", "--config", "two.yaml"]
    assert main(["fit", *files, *FIT[1:]]) == 0
    assert len(runs("one")) == 1
    assert main(["fit", *files, *FIT[1:], "--experiment", "mine"]) == 0
    assert len(runs("mine")) == 1
    assert main([*FIT, "--trainer.default_root_dir", "elsewhere"]) == 0
    assert len(list(Path("elsewhere/LitResNetBN").iterdir())) == 1


def test_the_config_in_a_run_directory_starts_a_run_like_it():
    assert main([*FIT, "--run", "a", "--seed_everything", "3"]) == 0
    config = Path("runs/LitResNetBN/a/config.yaml")
    assert main(["fit", "--config", str(config), "--run", "b"]) == 0
    assert config.read_text() == Path("runs/LitResNetBN/b/config.yaml").read_text()
    ours, theirs = (read_run(run).history for run in runs())
    assert ours.equals(theirs)


def test_resume_goes_on_in_place_and_the_newest_run_is_the_default():
    for name in ("old", "new"):
        assert main([*FIT, "--run", name]) == 0
    more = [*FIT, "--trainer.max_epochs", "2"]
    assert main([*more, "--ckpt_path", "last"]) == 0
    assert main([*more, "--ckpt_path", "last", "--run", "old"]) == 0
    assert main([*more, "--run", "unbroken"]) == 0
    unbroken = read_run("runs/LitResNetBN/unbroken").history
    for name in ("old", "new"):
        assert read_run(f"runs/LitResNetBN/{name}").history.equals(unbroken)
    assert len(runs()) == 3


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_checkpoint_is_evaluated_into_its_run_at_its_step(command):
    assert main([*FIT, "--run", "a"]) == 0
    status = json.loads(Path("runs/LitResNetBN/a/summary.json").read_text())["status"]
    args = [command, *FIT[1:], "--run", "a"]
    assert main([*args, *MONITOR, "--ckpt_path", "last"]) == 0
    assert main([*args, "--ckpt_path", "best"]) == 0
    history = read_run("runs/LitResNetBN/a").history
    key = {"test": "test/accuracy", "validate": "val/accuracy"}[command]
    assert history.loc[history[key].notna(), "step"].tolist() == [3]
    probed = history["activation/rate_mean"].notna()
    assert history.loc[probed, "step"].tolist() == [3]
    summary = json.loads(Path("runs/LitResNetBN/a/summary.json").read_text())
    assert summary["status"] == status == "finished"


def test_predict_runs_from_a_checkpoint():
    assert main([*FIT, "--run", "a"]) == 0
    assert main(["predict", *FIT[1:], "--run", "a", "--ckpt_path", "last"]) == 0
    predicted = torch.load("runs/LitResNetBN/a/predictions.pt")
    assert torch.cat(predicted).shape[1] == 10


def test_fast_dev_run_leaves_nothing():
    assert main([*FIT, *MONITOR, "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.ddp)])
def test_a_diverged_run_has_its_own_status(devices):
    args = ["fit", "--model", "LitMLP", *NET[2:], *PLAIN, "--trainer.logger=RunHistory"]
    args += ["--model.optimizer.lr", "1e30", "--model.loss", "mse"]
    if devices == 2:
        args += ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    assert main([*args, "--trainer.max_epochs", "9", "--test_after_fit", "true"]) == 3
    assert read_run(runs("LitMLP")[0]).summary["status"] == "diverged"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_has_its_own_status(number):
    # after Ctrl-C Lightning leaves the process deaf to it
    before = signal.getsignal(signal.SIGINT)
    callback = f"{{class_path: {__name__}.Interrupt, init_args: {{number: {number}}}}}"
    try:
        assert main([*FIT, f"--trainer.callbacks+={callback}"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_run(runs()[0]).summary["status"] == "interrupted"


class Careless(LightningModule):
    """Another project's module, which says nothing of divergence."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0].flatten(1)) ** 4).sum()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


@pytest.mark.parametrize(("lr", "status"), [("1e-6", 0), ("1e6", 3)])
def test_a_diverged_run_of_another_projects_module_has_its_own_status_too(lr, status):
    model = ["--model", f"{__name__}.Careless", "--model.lr", lr]
    args = ["fit", *model, *PLAIN, "--trainer.logger", "RunHistory"]
    assert main([*args, "--trainer.max_epochs", "3"]) == status
    found = read_run(runs("Careless")[0]).summary["status"]
    assert found == ("diverged" if status else "finished")


class Interrupt(Callback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        os.kill(os.getpid(), self.number)


def test_an_error_amid_training_is_one_line_and_the_traceback_on_demand(capsys):
    args = [*FIT, f"--trainer.callbacks+={__name__}.{Fail.__name__}"]
    assert "ZeroDivisionError: on purpose" in error_of(capsys, args, status=1)
    assert main([*args, "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert read_run(runs()[0]).summary["status"] == "failed"


class Fail(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise ZeroDivisionError("on purpose")


def test_a_probe_batch_larger_than_the_data_uses_what_is_there(caplog, capsys):
    args = [*FIT, *MONITOR, "--trainer.callbacks.num_examples", "100000"]
    with caplog.at_level("INFO"):
        assert main(args) == 0
    said = caplog.text + capsys.readouterr().err
    assert re.search("100000.*143|143.*100000", said)


def test_the_defaults_fill_shape_and_classes_and_the_users_values_win():
    data = ["--data", "Gaussian", "--data.batch_size", "20"]
    plain = PLAIN[: PLAIN.index("--data.num_train")]
    args = ["fit", *NET, *plain, "--trainer.logger", "RunHistory", *data]
    assert main([*args, "--run", "a"]) == 0
    config = yaml.safe_load(Path("runs/LitResNetBN/a/config.yaml").read_text())
    init = config["model"]["init_args"]
    assert init["in_shape"] is not None
    assert init["num_classes"] is not None
    assert config["trainer"]["use_distributed_sampler"] is False
    assert main([*FIT, "--model.num_classes", "10", "--run", "b"]) == 0


@pytest.mark.slow
def test_without_wandb_a_run_is_logged_locally_and_its_logger_refused():
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "import lit_resnorm, lit_resnorm.cli, lit_resnorm_callbacks\n"
        "sys.exit(lit_resnorm.cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "fit", *NET, *PLAIN, "--run", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is not installed") == 1
    assert Path("runs/LitResNetBN/a/history.jsonl").exists()
    command[-1] = "b"
    command += ["--trainer.logger", "WandbLogger"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trainer.logger: WandbLogger needs wandb" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["reproduce", "--list"],
        ["reproduce", "--help"],
        ["compare", "--help"],
        ["diagnose", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_lists_wait_for_no_torch(words):
    code = (
        "import sys; from lit_resnorm.cli import main; status = main(sys.argv[1:]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    slow = {"torch", "lightning", "matplotlib", "pandas", "wandb", "jsonargparse"}
    assert not slow & set(done.stderr.split())


def test_the_help_of_fit_explains_all_of_its_options(capsys):
    assert main(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--model", "--data", "--trainer.callbacks", "--run", "--ckpt_path"):
        assert option in said


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-resnorm {metadata.version('lit-resnorm')}\n"
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "compare", "reproduce"):
        assert f"\n  {command}  " in said
    assert main([*FIT, "--print_config"]) == 0
    assert "LitResNetBN" in capsys.readouterr().out


def test_wandb_gets_the_whole_config_once_and_its_labels():
    args = ["fit", *NET, *PLAIN, "--run", "a", "--seed_everything", "5"]
    assert main(args) == 0
    complete("runs")
    (run,) = read_offline_wandb("runs/LitResNetBN/a")
    ours = read_run("runs/LitResNetBN/a").config
    assert run.config == ours
    flat = {key: value for key, value in ours.items() if key != "config"}
    assert flat == {
        "variant": "LitResNetBN",
        "depth": 2,
        "width": 8,
        "data": "Digits",
        "optimizer": "SGD",
        "lr": 0.05,
        "batch_size": 20,
        "seed": 5,
    }
    assert run.name == "a"
    assert run.summary["status"] == "finished"


@pytest.mark.slow
def test_exit_status_and_error_from_the_shell():
    script = [str(Path(sys.executable).with_name("lit-resnorm")), "--version"]
    wrong = [sys.executable, str(ROOT / "train.py"), *FIT, "--model.depth", "0"]
    for command, status in ((script, 0), (wrong, 2)):
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == status
        assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_started_from_the_shell_log_once():
    args = [*FIT[:-2], "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    args += ["--trainer.log_every_n_steps", "1", *MONITOR]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (path,) = runs()
    history = read_run(path).history
    # 60 examples, 20 a batch and process
    assert history["train/loss"].count() == 2
    assert history["val/loss"].count() == 1
    assert not history.duplicated().any()
    assert done.stderr.count("Run directory") == 1
    (run,) = read_offline_wandb(path)
    assert run.history["train/loss"].count() == 2

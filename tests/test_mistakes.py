"""Mistakes that people make at the command line, and what it says of each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_resnorm.cli import main

ROOT = Path(__file__).resolve().parents[1]

NET = ["--model", "LitResNetBN", "--model.depth", "2", "--model.width", "8"]
FIT = [
    *("fit", *NET, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.logger", "RunHistory"),
    *("--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"),
    *("--data.num_train", "60", "--data.batch_size", "20"),
]
MONITOR = "--trainer.callbacks+=ActivationRateMonitor"
TWINS = "--trainer.callbacks+=StabilityProbe"
FIM = "--trainer.callbacks+=FIMEigenvalueProbe"
MEASURED = [FIM, "--trainer.callbacks.num_examples", "20"]

FILES = {
    "flow.yaml": "model:\n  class_path: LitResNetBN\n  init_args: [\n",
    "tab.yaml": "model:\n\tclass_path: LitResNetBN\n",
    "colon.yaml": "seed_everything: 0\ntrainer:\n  max_epochs: 3: 4\n",
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "key.yaml": "model:\n",
    "value.yaml": "trainer: 3\n",
    "binary.yaml": "\x00",
    "group.yaml": "trainr:\n  max_epochs: 1\n",
    "option.yaml": "trainer:\n  max_epoch: 1\n",
    "model.yaml": "model:\n  class_path: LitResNetB\n",
    "argument.yaml": "model:\n  class_path: LitMLP\n  init_args:\n    dept: 3\n",
    "callback.yaml": (
        "trainer:\n  callbacks:\n"
        "    - class_path: lit_resnorm_callbacks.MomentTracer\n"
        "    - class_path: lit_resnorm_callbacks.ActivationRateMonitor\n"
        "      init_args:\n        cadense: 5\n"
    ),
    "optimizer.yaml": (
        "model:\n  class_path: LitMLP\n  init_args:\n"
        "    optimizer: {class_path: torch.optim.SDG}\n"
    ),
}

# what is typed, and what the line must say
MISTAKES = {
    # commands
    "no command": ([], "no command; there are fit, .*compare, diagnose, reproduce"),
    "a misspelt command": (["fitt"], "'fitt'.*did you mean fit?"),
    "an option before the command": (["--model", "LitMLP"], "--model comes after a"),
    "a misspelt option alone": (["--verson"], "--verson .*did you mean --version"),
    # names of options
    "no dashes": (["fit", "model", "LitMLP"], "'model' is no option.* --model?"),
    "no dashes, deeper": ([*FIT, "data.batch_size", "3"], "mean --data.batch_size?"),
    "one dash": ([*FIT, "-model.depth", "3"], "'-model.depth'.* --model.depth?"),
    "an assignment": ([*FIT, "depth=3"], "'depth' is no option.* --model.depth?"),
    "a file without --config": (["fit", "a.yaml"], "did you mean --config a.yaml"),
    "a prefix": (
        [*FIT, "--trainer.max_epoch", "3"],
        "no option --trainer.max_epoch; .*--trainer.max_epochs",
    ),
    "a prefix of --model": (["fit", "--mod", "LitMLP"], "no option --mod; .* --model?"),
    "no group": ([*FIT, "--max_epochs", "3"], "--max_epochs; .*--trainer.max_epochs"),
    "no group of the model": ([*FIT, "--depth", "3"], "--depth; .* --model.depth?"),
    "no group of the optimizer": ([*FIT, "--lr", "1"], "--lr; .*--model.optimizer.lr"),
    "an option of the model": (
        [*FIT, "--model.dept", "3"],
        "--model.dept: LitResNetBN has no such option; .* depth?",
    ),
    "an option of the data": (
        [*FIT, "--data.batchsize", "3"],
        "--data.batchsize: Digits has no such option; .* batch_size?",
    ),
    "an option of the optimizer": (
        [*FIT, "--model.optimizer.momentm", "0.9"],
        "--model.optimizer.momentm: SGD has no such option; .* momentum?",
    ),
    "an option of another optimizer": (
        [*FIT, "--model.optimizer", "SGD", "--model.optimizer.betas", "[0.9, 0.9]"],
        "--model.optimizer.betas: SGD has no such option; it has .*momentum",
    ),
    "an option of a callback": (
        [*FIT, MONITOR, "--trainer.callbacks.cadense", "5"],
        "--trainer.callbacks.cadense: ActivationRateMonitor has no .* cadence?",
    ),
    "an option before its callback": (
        [*FIT, "--trainer.callbacks.cadence", "5", MONITOR],
        r"--trainer.callbacks.cadence: no callback stands before it",
    ),
    "an option of diagnose": (
        ["diagnose", *NET, "--num_exampels", "3"],
        "no option --num_exampels; .*--num_examples",
    ),
    "an option of compare": (["compare", "x", "--bst"], "no option --bst; .* --best?"),
    "a prefix in compare": (["compare", "x", "--be"], "no option --be; .* --best?"),
    "an option of reproduce": (
        ["reproduce", "furusho2020.fig1", "--sale", "full"],
        "no option --sale; .* --scale?",
    ),
    # values
    "a rate in words": (
        [*FIT, "--model.optimizer.lr", "high"],
        "--model.optimizer.lr: expected a number, got 'high'$",
    ),
    "a depth in words": (
        [*FIT, "--model.depth", "deep"],
        "--model.depth: expected a whole number, got 'deep'$",
    ),
    "half an epoch": (
        [*FIT, "--trainer.max_epochs", "1.5"],
        "--trainer.max_epochs: expected a whole number or null, got '1.5'$",
    ),
    "a seed in words": (
        [*FIT, "--seed_everything", "abc"],
        "--seed_everything: expected true or false or a whole number, got 'abc'$",
    ),
    "a seed below 0": ([*FIT, "--seed_everything", "-3"], "--seed_everything -3: it"),
    "a cadence in words": (
        [*FIT, MONITOR, "--trainer.callbacks.cadence", "often"],
        "--trainer.callbacks.cadence: expected .*a whole number, got 'often'$",
    ),
    "a switch in words": (
        [*FIT, "--trainer.enable_checkpointing", "perhaps"],
        "--trainer.enable_checkpointing: expected true or false.*'perhaps'$",
    ),
    "a precision": ([*FIT, "--trainer.precision", "17"], "--trainer.precision: .*'17'"),
    "no value": ([*FIT, "--model.depth"], "--model.depth: a value must follow"),
    "an output": (["diagnose", *NET, "--output", "sofmax"], "--output: .*'sofmax'"),
    "a scale": (
        ["reproduce", "furusho2020.fig1", "--scale", "big"],
        "--scale: .*'big'",
    ),
    "no device": ([*FIT, "--trainer.devices", "0"], "devices='0'"),
    "a strategy": ([*FIT, "--trainer.strategy", "dpp"], "strategy='dpp'"),
    "a share above 1": (
        [*FIT, "--trainer.val_check_interval", "1.5"],
        "1.5 for val_check_interval",
    ),
    "no batches to accumulate": (
        [*FIT, "--trainer.accumulate_grad_batches", "0"],
        "--trainer.accumulate_grad_batches 0: it must be 1 or more",
    ),
    "a clipped norm below 0": (
        [*FIT, "--trainer.gradient_clip_val", "-1"],
        "--trainer.gradient_clip_val -1.*: it must be 0 or more",
    ),
    "an activation": ([*FIT, "--model.activation", "rleu"], "activation .*'rleu'"),
    "a loss": ([*FIT, "--model.loss", "hinge"], "loss .*cross_entropy.*'hinge'"),
    "no batch": ([*FIT, "--data.batch_size", "0"], "batch_size must be at least 1"),
    "more data than there are": (
        [*FIT, "--data.num_train", "5000"],
        "num_train 5000 is more than the 1294",
    ),
    "more classes than there are": (
        [*FIT, "--model.num_classes", "12"],
        "num_classes=12 of LitResNetBN, but Digits has 10",
    ),
    "a negative rate": (
        [*FIT, "--model.optimizer.lr", "-1"],
        "--model.optimizer, .*-1",
    ),
    # what probes find at their set-up
    "eigenvalues below 0": (
        [*FIT, FIM, "--trainer.callbacks.num_eigenvalues", "-4"],
        "num_eigenvalues is -4",
    ),
    "sites that aren't there": (
        [*FIT, *MEASURED, "--trainer.callbacks.sites", "none"],
        "fim: no layer matches 'none'",
    ),
    "more twins than data": (
        [*FIT, TWINS, "--trainer.callbacks.num_twins", "99"],
        "stability: num_twins is 99",
    ),
    "two probes of a name": ([*FIT, MONITOR, MONITOR], "callbacks: two Activation"),
    # classes
    "a module that is missing": (
        ["fit", "--model", "LitClassifier"],
        "--model.net is missing, which LitClassifier needs",
    ),
    "two numbers that are missing": (
        ["fit", "--model", "LitClassifier", "--model.net", "torch.nn.Linear"],
        "--model.net.in_features, --model.net.out_features are missing",
    ),
    "a class to explain": (
        ["fit", "--model.help", "LitResNetB"],
        "--model.help: unknown class 'LitResNetB'; .*LitResNetBN",
    ),
    "a model": (["fit", "--model", "LitResNetB"], "--model: .*'LitResNetB';.*LitRes"),
    "a model in small letters": (
        ["fit", "--model", "litresnetbn"],
        "--model: .*'litresnetbn'; did you mean LitResNetBN?",
    ),
    "a model by path": (
        ["fit", "--model", "lit_resnorm.modules.LitSkipInt"],
        "'LitSkipInt' in lit_resnorm.modules; did you mean LitSkipInit?",
    ),
    "a model of no module": (["fit", "--model", "nosuch.Net"], "--model: .*'nosuch'"),
    "a callback for a model": (
        ["fit", "--model", "ActivationRateMonitor"],
        "--model: ActivationRateMonitor is no LightningModule",
    ),
    "a data set": ([*FIT, "--data", "NIST"], "--data: .*'NIST'; .* MNIST?"),
    "an optimizer": ([*FIT, "--model.optimizer", "Adm"], "optimizer: .*'Adm'; .*Adam?"),
    "an optimizer by path": (
        [*FIT, "--model.optimizer", "torch.optim.SDG"],
        "--model.optimizer: .*'SDG' in torch.optim; did you mean SGD?",
    ),
    "a scheduler": (
        [*FIT, "--model.lr_scheduler", "CosineAnealingLR"],
        "--model.lr_scheduler: .* CosineAnnealingLR?",
    ),
    "a logger": ([*FIT, "--trainer.logger", "WandLogger"], "logger: .* WandbLogger?"),
    "a callback": (
        [*FIT, "--trainer.callbacks+=ActivationMonitor"],
        "--trainer.callbacks: .*'ActivationMonitor'; .* ActivationRateMonitor?",
    ),
    "an item": (
        ["reproduce", "furusho2020.fg1"],
        "'furusho2020.fg1'; .*furusho2020.fig",
    ),
    # config files
    "no file": (["fit", "--config", "no.yaml"], "--config no.yaml: No such file"),
    "no file's name": (["fit", "--config"], "--config: the name of a file must"),
    "an open bracket": (
        ["fit", "--config", "flow.yaml"],
        "--config flow.yaml: line 4, column 1: expected the node content",
    ),
    "a tab": (
        ["fit", "--config", "tab.yaml"],
        r"tab.yaml: line 2, column 1: found character '\\t'.*indent by spaces",
    ),
    "two colons": (
        ["fit", "--config", "colon.yaml"],
        "--config colon.yaml: line 3, column 16: mapping values",
    ),
    "a list": (["fit", "--config", "list.yaml"], "list.yaml: it holds no options"),
    "an empty file": (["fit", "--config", "empty.yaml"], "empty.yaml: it holds no"),
    "no text": (["fit", "--config", "binary.yaml"], "--config binary.yaml: "),
    "a short option in full": (
        ["fit", "-config", "list.yaml"],
        "no option -config; did you mean --config?",
    ),
    "a key alone": (["fit", "--config", "key.yaml"], "key.yaml: model has no value"),
    "a value for a group": (
        ["fit", *NET, "--config", "value.yaml"],
        "--trainer: expected options, got 3",
    ),
    "a group in a file": (
        ["fit", *NET, "--config", "group.yaml"],
        r"--trainr.max_epochs \(group.yaml, line 2\): .*--trainer.max_epochs",
    ),
    "an option in a file": (
        ["fit", *NET, "--config", "option.yaml"],
        r"--trainer.max_epoch \(option.yaml, line 2\): .*--trainer.max_epochs",
    ),
    "a model in a file": (
        ["fit", "--config", "model.yaml"],
        r"--model \(model.yaml, line 2\): .*'LitResNetB'",
    ),
    "an argument in a file": (
        ["fit", "--config", "argument.yaml"],
        r"--model.dept \(argument.yaml, line 4\): LitMLP has no .* depth?",
    ),
    "a callback's option in a file": (
        ["fit", *NET, "--config", "callback.yaml"],
        r"cadense \(callback.yaml, line 6\): ActivationRateMonitor .* cadence?",
    ),
    "an optimizer in a file": (
        ["fit", "--config", "optimizer.yaml"],
        r"--model.optimizer \(optimizer.yaml, line 4\): .*'SDG'.* SGD?",
    ),
    # files that aren't there, or can't be
    "a checkpoint": ([*FIT, "--ckpt_path", "no.ckpt"], "--ckpt_path no.ckpt: "),
    "a checkpoint to test": (
        ["test", *FIT[1:], "--ckpt_path", "no.ckpt"],
        "--ckpt_path no.ckpt: ",
    ),
    "a root that is a file": (
        [*FIT, "--trainer.default_root_dir", "list.yaml"],
        "--trainer.default_root_dir list.yaml: no run can be written there",
    ),
    "a root below a file": (
        [*FIT, "--trainer.default_root_dir", "list.yaml/runs"],
        "--trainer.default_root_dir list.yaml/runs: no run can",
    ),
    "a root that can't be": (
        [*FIT, "--trainer.default_root_dir", "/proc/runs"],
        "--trainer.default_root_dir /proc/runs: no run can",
    ),
    "a config to diagnose": (["diagnose", "--config", "no.yaml"], "--config no.yaml: "),
    "a checkpoint to diagnose": (
        ["diagnose", "--checkpoint", "no.ckpt"],
        "--checkpoint no.ckpt: there is no such file",
    ),
    "nothing to diagnose": (["diagnose"], "diagnose: give --config"),
    "a run to compare": (["compare", "runs/none"], "runs/none: no such file"),
    "a folder to compare": (["compare", "none"], "none: no such file"),
    "no run to compare": (["compare"], "compare: .*required: RUN"),
    "a page's folder": (["compare", ".", "--out", "no/x.html"], "--out no/x.html: "),
    "a report's folder": (["diagnose", *NET, "--json", "no/x"], "--json no/x: no file"),
    "a folder of results": (
        ["reproduce", "furusho2020.fig1", "--out", "list.yaml"],
        "--out list.yaml: ",
    ),
    "a scheduler's address": (
        ["reproduce", "furusho2020.fig1", "--scheduler", "there"],
        "--scheduler there: it must be tcp://HOST:PORT",
    ),
    "no processes": (["reproduce", "furusho2020.fig1", "--jobs", "0"], "--jobs must"),
}


@pytest.fixture(autouse=True)
def _among_config_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(capsys, case):
    args, expected = MISTAKES[case]
    assert main(args) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("lit-resnorm: error: ")
    assert re.search(expected.replace("?", r"\?"), line), line
    # what jsonargparse and typing call things
    assert not re.search(r"typing\.|Namespace|<class|Parser key|class_path=", line)
    assert len(line) < 300
    assert not captured.out
    assert {str(path) for path in Path().rglob("*")} == set(FILES)


@pytest.mark.slow
def test_a_refused_run_takes_its_wandb_run_away_and_leaves_all_else(capsys):
    kept = Path("runs/LitResNetBN/mine/notes.txt")
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    loggers = FIT.index("--trainer.logger")
    args = [*FIT[:loggers], *FIT[loggers + 2 :], TWINS]
    assert main([*args, "--trainer.callbacks.num_twins", "99"]) == 2
    assert "num_twins is 99" in capsys.readouterr().err
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == [kept]


def test_a_run_that_a_refused_command_would_go_on_with_stays(capsys):
    assert main([*FIT, "--run", "a"]) == 0
    before = {*Path("runs").rglob("*")}
    more = [*FIT, "--trainer.max_epochs", "2", "--run", "a", "--ckpt_path", "last"]
    assert main([*more, *MEASURED, "--trainer.callbacks.sites", "none"]) == 2
    assert "no layer matches 'none'" in capsys.readouterr().err
    assert before <= {*Path("runs").rglob("*")}


def test_the_traceback_is_shown_where_it_is_asked_for(capsys):
    assert main([*FIT, "--model.depth", "deep", "--traceback"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("lit-resnorm: error: --model.depth: ")


@pytest.mark.slow
def test_a_shell_sees_one_line_and_status_2(tmp_path):
    # what the first import says would be in the output of a process alone
    commands = (
        [*FIT, "--model.activation", "rleu"],
        [*FIT, *MEASURED, "--trainer.callbacks.sites", "none"],
        ["compare", "runs/none"],
    )
    for command in commands:
        words = [sys.executable, str(ROOT / "train.py"), *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("lit-resnorm: error: ")
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)

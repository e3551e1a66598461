import json
import sys
from pathlib import Path

import pytest
import yaml

from lit_resnorm.cli import main
from lit_resnorm.cli.trust import Trust
from lit_resnorm.errors import UsageError

PLAIN = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.logger", "false", "--data.num_train", "64"),
]
SMALL = ["--model", "LitMLP", "--model.depth", "2", "--model.width", "8", *PLAIN]

EVIL = """
from pathlib import Path

import torch

Path("ran").touch()
from lit_resnorm import modules


class Stranger(modules.LitMLP):
    pass


class Module(torch.nn.Module):
    pass


def function(x):
    return x
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The directory of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit = ["fit", *SMALL, "--trainer.max_steps", "1", "--run", "a"]
        assert main(fit) == 0
    return folder / "runs" / "LitMLP" / "a"


@pytest.fixture
def place(run_dir, tmp_path, monkeypatch):
    """A directory with the run and, ready to be imported, a stranger's module."""
    target = tmp_path / "a" / "checkpoints"
    target.mkdir(parents=True)
    (target / "last.ckpt").write_bytes((run_dir / "checkpoints/last.ckpt").read_bytes())
    (tmp_path / "a" / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    (tmp_path / "evil_code.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("evil_code", None)


def diagnose(*words):
    return main(["diagnose", "--checkpoint", "a/checkpoints/last.ckpt", *words])


def changed(**changes):
    """Change the run's config, whose keys are given with `__` for dots."""
    path = Path("a/config.yaml")
    config = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *folders, last = key.split("__")
        inner = config
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    path.write_text(yaml.safe_dump(config))


def ran(place):
    """Return what the stranger's module leaves when it is imported."""
    return [*place.rglob("ran")]


EVIL_CLASS = {"class_path": "evil_code.Module"}
CHANGES = {
    "model": {"model": {"class_path": "evil_code.Stranger"}},
    "model in short": {"model": "evil_code.Stranger"},
    "model as text": {"model": "{class_path: evil_code.Stranger}"},
    "optimizer": {"model__init_args__optimizer": EVIL_CLASS},
    "callback": {"trainer__callbacks": [EVIL_CLASS]},
    "callback in short": {"trainer__callbacks": ["evil_code.Module"]},
    "logger": {"trainer__logger": EVIL_CLASS},
    "strategy": {"trainer__strategy": "evil_code.Module"},
    "net": {"model": {"class_path": "LitClassifier", "init_args": {"net": EVIL_CLASS}}},
    "deep net": {
        "model": {
            "class_path": "LitClassifier",
            "init_args": {
                "net": {
                    "class_path": "torch.nn.Sequential",
                    "init_args": {"args": [{"x": [EVIL_CLASS]}]},
                }
            },
        }
    },
    "function": {"model__init_args__activation": "evil_code.function"},
    "standard library": {"model__init_args__activation": "subprocess.call"},
    "through torch": {"model__init_args__activation": "torch.os.system"},
    "a function of torch": {
        "model": {
            "class_path": "LitClassifier",
            "init_args": {
                "net": {
                    "class_path": "torch.hub.load",
                    "init_args": {"repo_or_dir": "evil", "model": "x"},
                }
            },
        }
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_checkpoints_config_names_elsewhere_is_not_imported(place, name, capsys):
    changed(**CHANGES[name])
    before = {*sys.modules}
    assert diagnose() == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = [
        n for n in ("evil_code.", "subprocess.", "torch.os", "torch.hub") if n in line
    ]
    assert named
    assert "--trust" in line
    assert not ran(place)
    assert "evil_code" not in {*sys.modules} - before


def test_a_file_that_the_config_names_is_looked_at_too(place, capsys):
    Path("a/model.yaml").write_text("class_path: evil_code.Stranger\n")
    changed(model="model.yaml")
    assert diagnose() == 2
    assert "names evil_code.Stranger" in capsys.readouterr().err
    assert not ran(place)


def test_trust_imports_it_and_a_users_own_word_is_trusted(place, capsys):
    changed(model__class_path="evil_code.Stranger")
    for words in (["--trust"], ["--model", "evil_code.Stranger"]):
        assert diagnose(*words, *PLAIN) == 2
        assert "it is of LitMLP, the model is Stranger" in capsys.readouterr().err
        sys.modules.pop("evil_code")
        ran(place)[0].unlink()


def test_a_config_of_ours_needs_no_trust(place, capsys):
    assert diagnose("--json", "report.json", *PLAIN) in (0, 3)
    assert json.loads((place / "report.json").read_text())["rows"]


@pytest.mark.parametrize("words", [["--model", "LitMLP"], ["--config", "x.yaml"]])
def test_trust_where_there_is_nothing_to_trust_is_wrong_use(words, place, capsys):
    Path("x.yaml").write_text("model: LitMLP\n")
    assert main(["diagnose", *words, "--trust"]) == 2
    assert "--trust: there is no config" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: [", "a: " + "[" * 200 + "]" * 200])
def test_a_config_that_can_not_be_read_is_named(text, place, capsys):
    Path("a/config.yaml").write_text(text)
    assert diagnose() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.yaml: " in line


OURS = [
    "torch.nn.ReLU",
    "torch.optim.SGD",
    "torch.nn.functional.relu",
    "torch.relu",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "lit_resnorm.modules.LitMLP",
    "lit_resnorm_callbacks.MomentTracer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "torchvision.models.resnet18",
    "torch.nothing.Like.This",
    "weights.v2.final",
]
ELSEWHERE = [
    "torch.os.system",
    "torch.nn.modules.module.functools.partial",
    "lightning.pytorch.trainer.trainer.os.system",
    "os.path.join",
    "builtins.exec",
    "pytorch_lightning.Anything",
    "torchmetrics.Accuracy",
]


@pytest.mark.parametrize("name", OURS)
def test_our_own_names_and_texts_with_dots_are_trusted(name):
    Trust("x", []).check({"a": [{"b": name}]})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_lead_elsewhere_are_not(name):
    for config in (name, {"a": [{"class_path": name}]}, {"class_path": f" {name} "}):
        with pytest.raises(UsageError, match=f"x names {name}, which is none"):
            Trust("x", []).check(config)
    Trust("x", [f"--model={name}"]).check(name)

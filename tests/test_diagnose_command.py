"""`lit-resnorm diagnose` as it is typed."""

import json
from itertools import pairwise

import pytest

from lit_resnorm.cli import main
from lit_resnorm.diagnose.printing import MOST_ROWS, thinned
from lit_resnorm.diagnose.report import DepthRow

SMALL = ["--model", "LitResNetBN", "--model.depth", "5", "--model.width", "16"]
PLAIN = ["--model", "LitVanillaNet", "--model.depth", "40", "--model.width", "64"]
SLOW_RATE = ["--model.init_args.optimizer", "SGD"]
SLOW_RATE += ["--model.init_args.optimizer.init_args.lr", "1e-3"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def diagnose(*words):
    return main(["diagnose", "--num_examples", "32", *map(str, words)])


def test_a_network_without_a_verdict_leaves_with_0_and_nothing_behind(place, capsys):
    assert diagnose(*SMALL, *SLOW_RATE) == 0
    out = capsys.readouterr().out
    assert "undetermined" in out.splitlines()[-1]
    assert "lambda_max" in out
    assert not [*place.iterdir()]


def test_a_pathology_leaves_with_3_its_source_and_the_whole_table_as_json(
    place, capsys
):
    assert diagnose(*PLAIN, *SLOW_RATE, "--json", "report.json") == 3
    out = capsys.readouterr().out
    assert "signal pathology" in out
    assert "try: skip connections over units of batch norm" in out
    assert f"{MOST_ROWS} of 40 rows" in out
    report = json.loads((place / "report.json").read_text())
    assert report["healthy"] is False
    assert report["status"] == "pathological"
    assert len(report["rows"]) == 40
    assert report["curvature"]["rate"] == 0.001
    (finding,) = (f for f in report["findings"] if f["name"] == "signal")
    assert finding["suggestions"][0]["mark"] == "P"
    assert [path.name for path in place.iterdir()] == ["report.json"]


def test_a_rate_far_too_high_is_named_with_its_factor(capsys):
    fast = [*SLOW_RATE[:-1], "1e4"]
    assert diagnose(*SMALL, *fast, "--check-rate") == 3
    out = " ".join(capsys.readouterr().out.split())
    assert "rate too high by a factor" in out
    assert "60 full-batch steps of SGD with momentum 0.9: stable up to" in out


def test_configs_stack_and_seeds_change_the_network(place):
    (place / "model.yaml").write_text(
        "model:\n  class_path: LitMLP\n  init_args: {depth: 9, width: 16}\n"
    )
    (place / "more.yaml").write_text("data: {class_path: Digits}\n")
    files = ["--config", "model.yaml", "--config", "more.yaml"]
    reports = []
    for seed in (0, 1, 1):
        assert diagnose(*files, "--seed", seed, "--json", "report.json") in (0, 3)
        reports.append(json.loads((place / "report.json").read_text()))
    assert reports[0]["rows"] != reports[1]["rows"]
    assert reports[1] == reports[2]


def test_a_checkpoint_brings_its_own_config(place, capsys):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    fit = ["fit", *SMALL, *quiet, "--trainer.max_steps", "2", "--run", "a"]
    assert main([*fit, "--trainer.accelerator", "cpu"]) == 0
    (path,) = place.glob("runs/*/a/checkpoints/epoch*.ckpt")
    before = sorted(place.rglob("*"))
    assert diagnose("--checkpoint", path, "--json", "a.json") == 0
    assert diagnose(*SMALL, "--json", "b.json") == 0
    rows = [
        json.loads((place / name).read_text())["rows"] for name in ("a.json", "b.json")
    ]
    assert rows[0] != rows[1]
    assert set(place.rglob("*")) - set(before) == {place / "a.json", place / "b.json"}
    capsys.readouterr()
    assert diagnose("--checkpoint", path, *PLAIN) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--checkpoint {path}: it is of LitResNetBN" in error
    lone = place / "lone.ckpt"
    lone.write_bytes(path.read_bytes())
    assert diagnose("--checkpoint", lone) == 2
    assert "give --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --config, --checkpoint or --model"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--checkpoint", "none.ckpt"], "--checkpoint none.ckpt: there is no such"),
        ([*SMALL, "--model.depth", "deep"], "--model.depth: expected"),
        ([*SMALL, "--colour", "red"], "--colour"),
        ([*SMALL, "--num_examples", "0"], "--num_examples 0: it must be 1"),
        ([*SMALL, "--num_examples", "few"], "invalid int value: 'few'"),
        ([*SMALL, "--loss_scale", "-1"], "loss_scale is -1.0; it must be positive"),
        ([*SMALL, "--output", "poisson"], "--output: invalid choice: 'poisson'"),
        ([*SMALL, "--seed", "-1"], "--seed -1"),
        ([*SMALL, "--json", "missing/report.json"], "--json missing/report.json"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_option(words, message, capsys, place):
    assert diagnose(*words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "Seed set" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not captured.out
    assert not [*place.iterdir()]


OWN = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, nothing: bool = False):
        super().__init__()
        self.net = torch.nn.Identity() if nothing else torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.net(x)


class Data(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 8), torch.arange(8)), 4)
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "labels go from 0 to 7, and the output has 3 classes"),
        (["--model.nothing", "true"], "Net does nothing with its input"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line_and_status_2(
    words, message, capsys, place, monkeypatch
):
    (place / "own_of_a_user.py").write_text(OWN)
    monkeypatch.syspath_prepend(place)
    names = ["--model", "own_of_a_user.Net", "--data", "own_of_a_user.Data"]
    assert diagnose(*names, *words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "Seed set" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not captured.out


def test_output_and_loss_scale_are_those_of_the_report(place, capsys):
    curvatures = []
    for words in ([], ["--output", "gaussian"], ["--loss_scale", "3"]):
        assert diagnose(*SMALL, *SLOW_RATE, *words, "--json", "a.json") == 0
        curvatures.append(json.loads((place / "a.json").read_text())["curvature"])
    plain, squared, scaled = curvatures
    assert scaled["lambda_max"] == pytest.approx(3 * plain["lambda_max"], rel=2e-3)
    words = [curvature["loss"] for curvature in curvatures]
    names = "cross entropy", "half the squared distance", "3 times cross entropy"
    assert words == [*names]
    assert squared["lambda_max"] > plain["lambda_max"]
    out = " ".join(capsys.readouterr().out.split())
    for loss in words:
        assert f"({loss}), mean" in out


def test_help_says_what_it_finds_and_how_it_leaves(capsys):
    assert main(["diagnose", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--check-rate", "--checkpoint", "--json", "Exit status", "fit"):
        assert word in text


def test_tables_are_thinned_evenly_and_keep_both_ends():
    rows = [
        DepthRow(f"{n:03d}.a", "activation", n, 0.5, 0, 2, 0, None, 1, 1, 1)
        for n in range(100)
    ]
    shown = thinned(rows)
    assert len(shown) == MOST_ROWS
    assert (shown[0], shown[-1]) == (rows[0], rows[-1])
    gaps = {b.depth - a.depth for a, b in pairwise(shown)}
    assert gaps <= {4, 5}
    assert thinned(rows[:5]) == rows[:5]

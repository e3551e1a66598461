"""What the command line shows of a run, and its help."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lit_resnorm.cli import display, main
from lit_resnorm.cli.display import StageLines
from lit_resnorm.cli.fit_help import without_markup
from lit_resnorm.runs.wandb import WandbHistory

FIT = [
    *("fit", "--model", "LitResNetBN", "--model.depth", "2", "--model.width", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    *("--trainer.logger", "RunHistory", "--trainer.log_every_n_steps", "1"),
    *("--data.num_train", "60", "--data.batch_size", "20"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_is_no_terminal_gets_lines_in_place_of_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(display, "_SECONDS_BETWEEN_LINES", 0.0)
    assert main(FIT) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(r"epoch 1 of 2, batch 1 of 3, step 1.* \d+ s", lines[0])
    assert len(lines) == 2 * 3 + 1
    assert re.fullmatch(r"epoch 2 of 2 done, step 6, train/loss .* \d+ s", lines[-1])
    # a bar is drawn over itself
    assert "\r" not in captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err


def test_a_short_run_gets_one_line_and_a_table_without_empty_columns(capsys):
    assert main(FIT) == 0
    out = capsys.readouterr().out
    assert out.count("epoch") == 1
    assert "FLOPs" not in out
    assert re.search(r"\bnet +Net +848\b", out)
    assert re.search(r"\d[\d,]+ parameters, \d+ of them not trained", out)


def test_a_bar_and_a_summary_of_a_users_own_stay():
    class Bar(RichProgressBar):
        pass

    bar = Bar()
    trainer = Trainer(callbacks=[bar], logger=False, enable_checkpointing=False)
    display.suit_output(trainer)
    assert trainer.progress_bar_callback is bar


def test_the_summary_says_nothing_of_sizes_that_it_does_not_give(capsys):
    assert main([*FIT, "--trainer.precision", "bf16-mixed"]) == 0
    assert "summary" not in capsys.readouterr().err


def test_nothing_is_advertised_or_said_twice(capsys, caplog):
    with caplog.at_level("INFO"):
        assert main([*FIT, "--trainer.callbacks+=ActivationRateMonitor"]) == 0
    captured = capsys.readouterr()
    said = captured.out + captured.err + caplog.text
    for word in ("Tip", "litlogger", "available: False", "TPU", "Seed set", "FLOPs"):
        assert word not in said
    assert caplog.text.count("`Trainer.fit` stopped") == 1


def test_a_run_says_nothing_of_what_nobody_chose_and_where_it_lies(
    capfd, caplog, monkeypatch
):
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    words = [word for word in FIT if word not in ("--trainer.log_every_n_steps", "1")]
    probe, report = "ActivationRateMonitor", "lit_resnorm.compare.report.RunReport"
    words += [f"--trainer.callbacks+={probe}", f"--trainer.callbacks+={report}"]
    loggers = "--trainer.logger=[RunHistory,WandbHistory]", "--run", "a"
    offline = "--trainer.logger.offline", "true"
    with caplog.at_level("INFO"):
        assert main([*words, *loggers[:1], *offline, *loggers[1:]]) == 0
    captured = capfd.readouterr()
    said = captured.out + captured.err + caplog.text
    for noise in ("wandb: ", "logging interval", "num_examples is", "deprecated"):
        assert noise not in said
    run = "runs/LitResNetBN/a"
    folder = Path(run, "wandb")
    (recorded,) = folder.glob("offline-run-*")
    ours = [each for each in caplog.records if each.name.startswith("lightning")]
    last = [each.getMessage() for each in ours][-3:]
    name = "offline-run-*-" + recorded.name.rpartition("-")[2]
    assert last == [
        f"Run directory: {run}",
        f"W&B, offline: wandb sync {folder / name}",
        f"Report, to open in a browser: {run}/report.html",
    ]
    caplog.clear()
    more = [*words, "--trainer.max_epochs", "3", "--run", "a", "--ckpt_path", "last"]
    with caplog.at_level("INFO"):
        assert main(more) == 0
    captured = capfd.readouterr()
    assert "not empty" not in captured.out + captured.err + caplog.text


def test_an_interval_that_was_chosen_is_advised_on(capfd):
    with pytest.warns(UserWarning, match="smaller than the logging interval"):
        assert main([*FIT, "--trainer.log_every_n_steps", "7"]) == 0


def test_a_number_of_examples_that_was_chosen_and_is_not_there_is_told(caplog):
    chosen = "--trainer.callbacks+=ActivationRateMonitor", "--trainer.callbacks."
    with caplog.at_level("INFO"):
        assert main([*FIT, chosen[0], chosen[1] + "num_examples", "999"]) == 0
    assert "num_examples is 999 and the probe data hold" in caplog.text


@pytest.mark.parametrize(
    ("markup", "words"),
    [
        (":class:`~lightning.pytorch.Trainer` and", "Trainer and"),
        (":class:`datetime.timedelta`", "datetime.timedelta"),
        ("see :ref:`the docs <lightning-cli>`.", "see the docs."),
        ("``True`` or ``'a'``", "True or 'a'"),
        ("`Notes <https://a.b/c>`_", "Notes (https://a.b/c)"),
        ("**one** of 2**32 and 3**2", "one of 2**32 and 3**2"),
    ],
)
def test_help_is_free_of_markup(markup, words):
    assert without_markup(markup) == words


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_help_of_a_command_is_grouped_and_says_what_to_type_next(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lit-resnorm {command} [--config FILE")
    titles = [line for line in out.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert titles == ["Run:", "Model:", "Data:", "Start from:", "Trainer:"]
    flat = " ".join(out.split())
    assert "--model LitResNetBN --model.depth 20 --model.optimizer Adam" in flat
    assert not re.search(r"``|:\w+:`|`_|<class", out)


def test_the_help_of_reproduce_says_what_scales_are_and_where_results_go(capsys):
    assert main(["reproduce", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search("small .*seconds to minutes.*full: .*sizes and data", out)
    assert "verdict.json, curves.csv, figure.png" in out
    assert not Path("reproduced").exists()


def test_wandb_is_not_given_what_it_warns_of(tmp_path):
    # what wandb.init is called with, which says so in the terminal alone
    assert "anonymous" not in WandbHistory(save_dir=tmp_path)._wandb_init


def test_stages_of_a_command_are_lines_now_and_then():
    said, times = [], iter([0.0, 5.0, 11.0, 12.0, 22.0])
    lines = StageLines(said.append, lambda: next(times))
    for done in range(3):
        lines("steps at the rate", done, 60)
    lines("curvature", 0, 1)
    assert said == ["steps at the rate, 1 of 60, 11 s\n", "curvature, 22 s\n"]

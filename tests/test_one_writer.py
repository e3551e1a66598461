"""Who may write a run directory, where a run begins, and how it ends."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time

import pytest
import yaml
from killing import Moment, fit, forked, interrupt, obey_modes, recorded, started
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from test_runs import QUIET, Counter, KillError, loader

import lit_resnorm.cli.fit  # noqa: F401 (imported once, for the forked processes)
from lit_resnorm.cli import main
from lit_resnorm.runs import RunHistory, read_run
from lit_resnorm.runs.directories import last_checkpoint
from lit_resnorm.runs.lock import LOCK, hold, release

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: lit_resnorm.runs.RunHistory
model:
  class_path: lit_resnorm.modules.LitMLPBN
  init_args: {depth: 2, width: 8}
data:
  class_path: lit_resnorm.data.Digits
  init_args: {num_train: 60, num_val: 20, batch_size: 20}
"""
STEP = "lit_resnorm.modules.classifier:LitClassifier.training_step"
MEASURE = "lit_resnorm_callbacks.activation_rate:ActivationRateMonitor.measure"
GO_ON = ("--run", "a", "--ckpt_path", "last")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    return tmp_path


def run_in(folder):
    return folder / "runs/small/a"


def whole_run(folder, *words):
    """Return the directory of an unbroken run, begun under the name that all have."""
    assert fit(folder, *words, "--run", "a") == 0, said(folder)
    return run_in(folder).rename(folder / "whole")


def said(folder):
    return (folder / "said.txt").read_text()


def other(function, tmp_path):
    """Return the status of `function()`, None being 0, in another process."""
    return forked(lambda: function() or 0, said=tmp_path / "other.txt")


def test_another_process_is_refused_while_the_first_lives(tmp_path):
    hold(tmp_path)
    hold(tmp_path)

    # a child is taken for a rank of the holder; its own child isn't
    def other_process(function):
        return forked(lambda: function() or 0, said=tmp_path / "other.txt")

    def not_mine():
        with pytest.raises(ValueError, match="is being written by process"):
            hold(tmp_path)

    assert other(lambda: other_process(not_mine), tmp_path) == 0
    release(tmp_path)
    assert other(lambda: other_process(not_mine), tmp_path) == 0
    release(tmp_path)
    assert other(lambda: hold(tmp_path), tmp_path) == 0


def test_a_kill_lets_go_though_what_the_process_forked_lives_on(tmp_path):
    ready = tmp_path / "ready"

    def holder():
        hold(tmp_path)
        if os.fork() == 0:
            os.setpgid(0, 0)
            ready.touch()
            time.sleep(10)
            os._exit(0)
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(holder, said=tmp_path / "said.txt") == -signal.SIGKILL
    hold(tmp_path)
    release(tmp_path)


def test_of_two_resumes_at_once_one_is_refused_in_a_line(folder):
    assert fit(folder, "--run", "a", at=Moment(STEP, 5)) == -signal.SIGKILL

    def wait():
        (folder / "under_way").touch()
        time.sleep(600)

    def slow():
        os.chdir(folder)
        interrupt(Moment(STEP, 2), wait)
        return main(["fit", "--config", "small.yaml", *GO_ON])

    first = started(slow, said=folder / "first.txt")
    deadline = time.monotonic() + 300
    while not (folder / "under_way").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        before = (run_in(folder) / "history.jsonl").read_bytes()
        assert fit(folder, *GO_ON) == 2
        error = said(folder).splitlines()[-1]
        assert "lit-resnorm: error: runs/small/a is being written by process" in error
        assert (run_in(folder) / "history.jsonl").read_bytes() == before
    finally:
        os.killpg(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert fit(folder, *GO_ON) == 0, said(folder)


BEGINNINGS = {
    "start-up": Moment("lit_resnorm.cli.fit:choose_run", after=True),
    "config": Moment("lit_resnorm.cli.run:replace_file"),
    "half a config": Moment("lit_resnorm.runs.json_lines:os.replace"),
    "first epoch": Moment(STEP, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", BEGINNINGS)
def test_a_run_without_a_checkpoint_begins_anew_in_place(folder, moment):
    whole = whole_run(folder)
    assert fit(folder, "--run", "a", at=BEGINNINGS[moment]) == -signal.SIGKILL
    assert fit(folder, *GO_ON) == 0, said(folder)
    assert "--ckpt_path last: runs/small/a has no checkpoint, it begins anew" in said(
        folder
    )
    assert recorded(run_in(folder)) == recorded(whole)
    config = yaml.safe_load((run_in(folder) / "config.yaml").read_text())
    assert config["model"]["init_args"]["width"] == 8


def test_an_ended_run_without_a_checkpoint_is_left_alone(folder):
    run = run_in(folder)
    run.mkdir(parents=True)
    (run / "history.jsonl").write_text('{"step": 3, "epoch": 0, "a": 1.0}\n')
    (run / "summary.json").write_text('{"status": "finished"}')
    assert fit(folder, *GO_ON) == 2
    assert "runs/small/a has no checkpoint" in said(folder)
    assert (run / "history.jsonl").read_text()


class Meanwhile(Callback):
    """Does something amid a run, after its fourth batch."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == 3:
            self.action()


def counted(path, *callbacks, ckpt_path=None):
    trainer = Trainer(
        logger=RunHistory(path),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(Counter(), loader(), loader(2), ckpt_path=ckpt_path)
    return trainer


def test_a_run_directory_that_vanishes_is_an_error_at_the_end(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"taken away: .*history\.jsonl"):
        counted(run, Meanwhile(lambda: shutil.rmtree(run)))
    assert not (run / "summary.json").exists()


def test_a_history_that_cannot_be_written_ends_the_run_as_failed(tmp_path):
    """A limit on the size of files stands for a full disk: both fail in `write`."""

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (tmp_path / "run/history.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))

    def run():
        with (
            pytest.warns(UserWarning, match="is incomplete"),
            pytest.raises(OSError, match=r"File too large: .*history\.jsonl") as error,
        ):
            counted(tmp_path / "run", Meanwhile(full))
        assert error.value.errno == errno.EFBIG

    assert other(run, tmp_path) == 0, (tmp_path / "other.txt").read_text()
    # the row that was cut short isn't read, and what ended the run was told
    run = read_run(tmp_path / "run")
    assert run.history["train/steps"].dropna().tolist()[:3] == [0.0, 1.0, 2.0]
    assert run.summary["status"] != "finished"


def test_an_error_in_writing_that_a_probe_survives_still_fails_the_run(tmp_path):
    class Swallows(Callback):
        def on_train_end(self, trainer, module):
            (tmp_path / "run/figures/a.png.new").mkdir(parents=True)
            with pytest.raises(OSError, match="directory"):
                trainer.logger.log_image("a", [Figure()])

    with pytest.raises(OSError, match=r"directory: .*a\.png"):
        counted(tmp_path / "run", Swallows())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_an_error_in_writing_does_not_hide_what_ended_the_run(tmp_path):
    run = tmp_path / "run"

    def vanish_and_fail():
        shutil.rmtree(run)
        raise KillError

    with (
        pytest.warns(UserWarning, match="is incomplete"),
        pytest.raises(KillError),
    ):
        counted(run, Meanwhile(vanish_and_fail))


def test_a_directory_that_cannot_be_written_is_refused_at_once(folder):
    (folder / "runs").mkdir(mode=0o500)
    assert fit(folder, "--run", "a", before=obey_modes) == 2
    refused = "--trainer.default_root_dir runs: no run can be written there"
    assert said(folder).endswith(f"{refused} (Permission denied)\n")
    assert not [*(folder / "runs").iterdir()]


READ_ONLY = {
    "the run's directory": ((".",), 2, "no run can be written there"),
    "its lock": ((LOCK,), 2, "no run can be written there"),
    "its checkpoints": (("checkpoints",), 1, "Permission denied: .*checkpoints"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", READ_ONLY)
def test_a_run_that_cannot_be_written_any_more_does_not_end_well(folder, what):
    places, status, reason = READ_ONLY[what]
    assert fit(folder, "--run", "a", at=Moment(STEP, 5)) == -signal.SIGKILL
    modes = [0o500 if (run_in(folder) / one).is_dir() else 0o400 for one in places]
    for one, mode in zip(places, modes, strict=True):
        (run_in(folder) / one).chmod(mode)
    assert fit(folder, *GO_ON, before=obey_modes) == status, said(folder)
    assert re.search(reason, said(folder).splitlines()[-1])
    assert read_run(run_in(folder)).summary["status"] != "finished"
    for one in places:
        (run_in(folder) / one).chmod(0o700)
    assert fit(folder, *GO_ON) == 0, said(folder)


@pytest.mark.slow
def test_a_run_whose_directory_is_made_read_only_amid_it_fails(folder):
    def close():
        run_in(folder).chmod(0o500)
        (run_in(folder) / "checkpoints").chmod(0o500)

    at = Moment(STEP, 5)
    assert fit(folder, "--run", "a", at=at, act=close, before=obey_modes) == 1
    assert "Permission denied" in said(folder).splitlines()[-1]
    for one in (".", "checkpoints"):
        (run_in(folder) / one).chmod(0o700)
    assert read_run(run_in(folder)).summary["status"] != "finished"
    assert fit(folder, *GO_ON) == 0, said(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": "x"}', "[" * 9999])
def test_a_damaged_summary_is_made_anew_from_the_history(tmp_path, text):
    run, summary = tmp_path / "run", tmp_path / "run/summary.json"
    trainer = counted(run)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    whole = json.loads(summary.read_text())
    summary.write_text(text)
    with pytest.warns(
        UserWarning, match=r"summary.json is damaged, it is written anew"
    ):
        counted(run, ckpt_path=tmp_path / "end.ckpt")
    made = json.loads(summary.read_text())
    assert {**made, "seconds": 0} == {**whole, "seconds": 0}


SIGNALS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (130, "interrupted"),
    signal.SIGUSR1: (-signal.SIGUSR1, "running"),
    signal.SIGHUP: (-signal.SIGHUP, "running"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_after_any_signal_a_run_goes_on_without_a_lost_row(folder, number):
    whole = whole_run(folder)
    status, word = SIGNALS[number]
    send = lambda: os.kill(os.getpid(), number)  # noqa: E731
    assert fit(folder, "--run", "a", at=Moment(STEP, 5), act=send) == status
    summary = run_in(folder) / "summary.json"
    if word == "interrupted":
        assert json.loads(summary.read_text())["status"] == word
    assert read_run(run_in(folder)).summary["status"] == "interrupted"
    assert fit(folder, *GO_ON) == 0, said(folder)
    assert recorded(run_in(folder)) == recorded(whole)


def test_the_lock_names_its_process(tmp_path):
    hold(tmp_path)
    assert (tmp_path / LOCK).read_text().split()[0] == str(os.getpid())
    release(tmp_path)


def test_a_loop_that_starts_a_run_again_begins_with_the_same_words(folder):
    assert fit(folder, *GO_ON, at=Moment(STEP, 2)) == -signal.SIGKILL
    assert "there is no run runs/small/a yet, it begins" in said(folder)
    assert fit(folder, *GO_ON, at=Moment(STEP, 5)) == -signal.SIGKILL
    assert fit(folder, *GO_ON) == 0, said(folder)
    # a run that is complete is left as it is
    whole = recorded(run_in(folder))
    assert fit(folder, *GO_ON) == 0, said(folder)
    assert recorded(run_in(folder)) == whole


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
REQUEUED_AT = {
    "amid a batch": Moment(STEP, 5),
    "amid a validation": Moment(STEP.replace("training", "validation"), 3),
    "amid a measurement": Moment(MEASURE, 2),
    "in the last measurement": Moment(MEASURE, 4),
    "in the closing": Moment("lit_resnorm.runs.writer:RunWriter.write_images"),
    "before the first batch": Moment(MEASURE, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", REQUEUED_AT)
def test_a_job_that_slurm_requeues_goes_on_where_it_was(folder, monkeypatch, moment):
    """`scontrol` is one that kills the job at once, as SLURM does a little later."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    command = folder / "bin/scontrol"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$@" >> requeued.txt\nkill -9 0\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    probe = "--trainer.callbacks+=ActivationRateMonitor"
    words = (probe, "--trainer.callbacks.cadence", "2", "--ckpt_path", "last")
    whole = whole_run(folder, *words)
    send = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
    at = REQUEUED_AT[moment]
    assert fit(folder, *words, "--run", "a", at=at, act=send) == -signal.SIGKILL
    assert (folder / "requeued.txt").read_text() == "requeue 17\n"
    assert last_checkpoint(run_in(folder)).name == "hpc_ckpt_1.ckpt"
    assert fit(folder, *words, "--run", "a") == 0, said(folder)
    assert recorded(run_in(folder)) == recorded(whole)

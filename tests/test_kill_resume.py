"""A run that is killed amid an epoch and resumed is the unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lit_resnorm.runs.files import TABLES, read_run
from lit_resnorm.runs.json_lines import read_rows
from lit_resnorm.runs.wandb_offline import read_offline_wandb

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path(__file__).parent
# ten batches an epoch
CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lit_resnorm_callbacks.ActivationRateMonitor
      init_args: {cadence: 3}
    - class_path: lit_resnorm_callbacks.StabilityProbe
      init_args: {cadence: 5, num_twins: 3, num_examples: 32}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 4, save_last: link}
model:
  class_path: lit_resnorm.modules.LitResNetBN
  init_args: {depth: 2, width: 16}
data:
  class_path: lit_resnorm.data.Digits
  init_args: {num_train: 200, batch_size: 20, augment: true, num_workers: 2}
"""


class KillBefore(Callback):
    """Kills the process before a batch, counted over epochs, with the hard signal."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, *args, accumulate=1):
    (folder / "small.yaml").write_text(CONFIG)
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "train.py"), "fit"),
            *("--config", "small.yaml"),
            *("--trainer.accumulate_grad_batches", str(accumulate)),
            *args,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


def killer(batch):
    callback = {"class_path": "test_kill_resume.KillBefore"}
    callback["init_args"] = {"batch": batch}
    return f"--trainer.callbacks+={yaml.safe_dump(callback, default_flow_style=True)}"


def without_times(history):
    times = [key for key in history if key.endswith("/seconds")]
    return history.drop(columns=times).reset_index(drop=True)


def by_step_and_key(history):
    """Return {(step, key): value} of a history, whichever rows they came in."""
    long = without_times(history).drop(columns="epoch").melt("step").dropna()
    assert not long.duplicated(["step", "variable"]).any()
    return {(step, key): value for step, key, value in long.itertuples(index=False)}


@pytest.mark.slow
@pytest.mark.parametrize(("killed_at", "accumulate"), [(17, 1), (27, 3)])
def test_a_killed_run_ends_with_the_bits_and_the_log_of_the_unbroken_one(
    tmp_path, killed_at, accumulate
):
    whole = tmp_path / "runs/small/whole"
    broken = tmp_path / "runs/small/broken"
    status, said = fit(tmp_path, "--run", "whole", accumulate=accumulate)
    assert status == 0, said
    named = ("--run", "broken")
    status, said = fit(tmp_path, *named, killer(killed_at), accumulate=accumulate)
    assert status == -signal.SIGKILL, said
    assert read_run(broken).summary["status"] == "interrupted"
    last = ("--ckpt_path", "last")
    status, said = fit(tmp_path, *named, *last, accumulate=accumulate)
    assert status == 0, said

    states = [torch.load(run / "checkpoints/last.ckpt") for run in (whole, broken)]
    for kept in ("state_dict", "optimizer_states", "train_means", "global_step"):
        assert_same(states[0][kept], states[1][kept])
    twins = [state["callbacks"]["StabilityProbe{stability}"] for state in states]
    assert twins[0]["twins"]["forked"] == [0, 1, 2]
    assert_same(*twins)

    ours, theirs = read_run(broken), read_run(whole)
    assert ours.summary["status"] == "finished"
    pd.testing.assert_frame_equal(
        without_times(ours.history), without_times(theirs.history), check_exact=True
    )
    tables = [file.relative_to(whole) for file in whole.glob(f"{TABLES}/**/*.jsonl")]
    assert tables
    for table in tables:
        assert read_rows(broken / table) == read_rows(whole / table)

    (ours,), (theirs,) = (read_offline_wandb(run) for run in (broken, whole))
    assert by_step_and_key(ours.history) == by_step_and_key(theirs.history)


def assert_same(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs

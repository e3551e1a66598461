"""An offline W&B run of a run that was killed holds the rows of the history."""

import signal

import pytest
from killing import Moment, fit

import lit_resnorm.cli.fit  # noqa: F401 (imported once, for the forked processes)
from lit_resnorm.runs.files import HISTORY
from lit_resnorm.runs.json_lines import read_rows
from lit_resnorm.runs.wandb_offline import read_offline_wandb

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {every_n_train_steps: 4, save_last: link}
model:
  class_path: lit_resnorm.modules.LitMLPBN
  init_args: {depth: 2, width: 8}
data:
  class_path: lit_resnorm.data.Digits
  init_args: {num_train: 200, num_val: 20, batch_size: 20}
"""
STEP = "lit_resnorm.modules.classifier:LitClassifier.training_step"
NEVER, AT_ONCE = "1000", "0.1"


def by_step_and_key(rows):
    return {
        (row["step"], key): value
        for row in rows
        for key, value in row.items()
        if key not in ("step", "epoch") and value == value
    }


@pytest.mark.parametrize(
    ("killed_at", "flushed"),
    [
        ([13], NEVER),
        pytest.param([3, 15, 3], NEVER, marks=pytest.mark.slow),
        pytest.param([3, 15, 3], AT_ONCE, marks=pytest.mark.slow),
    ],
)
def test_what_wandb_had_not_written_when_it_was_killed_is_sent_again(
    tmp_path, monkeypatch, killed_at, flushed
):
    # W&B writes what fills a block, and the rest after so many seconds
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", flushed)
    (tmp_path / "small.yaml").write_text(CONFIG)
    run, goes_on = tmp_path / "runs/small/a", ()
    # a start that is done anew may have logged what the next doesn't
    every = "1"
    for count in killed_at:
        words = ("--run", "a", *goes_on, "--trainer.log_every_n_steps", every)
        killed = fit(tmp_path, *words, at=Moment(STEP, count))
        assert killed == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
        goes_on = ("--ckpt_path", "last")
        every = "2" if len(killed_at) > 1 else "1"
    words = ("--run", "a", *goes_on, "--trainer.log_every_n_steps", every)
    assert fit(tmp_path, *words) == 0, (tmp_path / "said.txt").read_text()
    history = by_step_and_key(read_rows(run / HISTORY))
    assert len(history) == (20 if every == "1" else 10) + 5 * 2
    (recorded,) = read_offline_wandb(run)
    assert by_step_and_key(recorded.history.to_dict("records")) == history

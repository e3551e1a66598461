"""A run that is killed at any moment and resumed is the unbroken run."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from killing import Moment, forked, interrupt, kill_all, recorded, started
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)

from lit_resnorm.data import Digits, StepSeed
from lit_resnorm.modules import LitMLPBN
from lit_resnorm.runs import ExactResume, RunHistory
from lit_resnorm.runs.directories import (
    checkpoints,
    clear,
    has_not_begun,
    last_checkpoint,
)
from lit_resnorm.runs.files import TABLES, read_run
from lit_resnorm.runs.json_lines import read_rows
from lit_resnorm.runs.wandb_offline import read_offline_wandb
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
    StabilityProbe,
)

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = os.pathsep.join(str(ROOT / part) for part in ("tests", "", "callbacks"))
SAVED = Moment(
    f"{ModelCheckpoint.__module__}:ModelCheckpoint._save_checkpoint", 1, True
)
SAVING = SAVED._replace(after=False)
STEP = "lit_resnorm.modules.classifier:LitClassifier.training_step"
VALIDATION = "lit_resnorm.modules.classifier:LitClassifier.validation_step"
ROW = "lit_resnorm.runs.writer:RunWriter.add_row"
MEASURE = "lit_resnorm_callbacks.activation_rate:ActivationRateMonitor.measure"
PROBE = "lit_resnorm_callbacks.probe.probe"
LINK = f"{ModelCheckpoint.__module__}:ModelCheckpoint._link_checkpoint"
FIGURE = "lit_resnorm.runs.writer:RunWriter.write_images"
TABLE = "lit_resnorm.runs.writer:RunWriter.add_table"


def plateau(optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    return scheduler(optimizer, factor=0.5, patience=0, threshold=10.0)


def early_stopping():
    return EarlyStopping("val/loss", min_delta=10.0, patience=1)


def twins():
    return StabilityProbe(cadence=4, num_twins=2, num_examples=16)


def moments():
    return MomentTracer(cadence=2, num_examples=16)


def fisher():
    return FIMEigenvalueProbe(cadence=3, num_examples=8, num_eigenvalues=3)


def influence():
    options = {"name": "influence", "num_twins": 2, "num_examples": 16}
    return StabilityProbe(method="influence", cadence=6, **options)


# three batches an epoch: options of model, checkpoint, trainer, and callbacks
VARIANTS = {
    "each epoch": ({}, {}, {}, ()),
    "each step": ({}, {"every_n_train_steps": 1}, {}, ()),
    "each epoch's last step": ({}, {"every_n_train_steps": 3}, {}, ()),
    "after validation": ({}, {"monitor": "val/loss"}, {}, ()),
    "after validation amid the epoch": ({}, {}, {"val_check_interval": 2}, ()),
    "each step, validation amid the epoch": (
        {},
        {"every_n_train_steps": 1},
        {"val_check_interval": 2},
        (),
    ),
    "steps of two batches": (
        {},
        {"every_n_train_steps": 1},
        {"accumulate_grad_batches": 2, "val_check_interval": 1},
        (),
    ),
    "amid the batches of a step": (
        {},
        {"monitor": "val/loss", "save_top_k": -1},
        {"accumulate_grad_batches": 3, "val_check_interval": 2, "max_epochs": 4},
        (twins,),
    ),
    "steps of ever more batches": (
        {},
        {"every_n_train_steps": 1},
        {"max_epochs": 3},
        (lambda: GradientAccumulationScheduler({0: 1, 1: 2}),),
    ),
    "each step, with all probes": (
        {},
        {"every_n_train_steps": 1},
        {},
        (twins, moments, fisher, influence),
    ),
    "so many steps": (
        {},
        {"every_n_train_steps": 1},
        {"max_steps": 4, "max_epochs": -1},
        (),
    ),
    "so many steps, each epoch": ({}, {}, {"max_steps": 6, "max_epochs": -1}, ()),
    "rows now and then": (
        {},
        {"every_n_train_steps": 1},
        {"log_every_n_steps": 2, "limit_val_batches": 0},
        (),
    ),
    "a rate that falls": (
        {"lr_scheduler": plateau},
        {"every_n_train_steps": 1},
        {"max_epochs": 3},
        (),
    ),
    "a rate that falls, each epoch": (
        {"lr_scheduler": plateau},
        {},
        {"max_epochs": 3},
        (),
    ),
    "stopped early": ({}, {}, {"max_epochs": 4}, (early_stopping,)),
    "stopped early, after validation": (
        {},
        {"monitor": "val/accuracy", "mode": "max", "save_top_k": -1},
        {"max_epochs": 4},
        (early_stopping,),
    ),
    "by hand": ({"by_hand": True}, {}, {"limit_val_batches": 0}, ()),
    "two ranks, amid the batches of a step": (
        {},
        {"monitor": "val/loss", "save_top_k": -1},
        {
            "accumulate_grad_batches": 3,
            "val_check_interval": 2,
            "max_epochs": 4,
            "devices": 2,
            "strategy": "ddp_fork",
        },
        (twins,),
    ),
    "two ranks, each step": (
        {},
        {"every_n_train_steps": 2},
        {"devices": 2, "strategy": "ddp_fork"},
        (),
    ),
    "two ranks, each epoch": ({}, {}, {"devices": 2, "strategy": "ddp_fork"}, ()),
    "by time": ({}, {"train_time_interval": timedelta(0)}, {}, ()),
}


class ByHand(LitMLPBN):
    """Steps two optimizers itself, at every second batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 2:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        halves = list(self.parameters())[::2], list(self.parameters())[1::2]
        return [torch.optim.SGD(half, lr=0.1) for half in halves]


def train(run, variant="each epoch", probes=()):
    """Train in this process, from the run's last checkpoint if there is one."""
    model, saving, options, more = VARIANTS[variant]
    torch.manual_seed(0)
    model = {"depth": 2, "width": 8, **model}
    module = ByHand(**model) if model.pop("by_hand", False) else LitMLPBN(**model)
    save = {"save_last": "link", "enable_version_counter": False} | saving
    callbacks = [
        ActivationRateMonitor(cadence=4, num_examples=16),
        *probes,
        *(make() for make in more),
        StepSeed(0),
        ExactResume(),
        ModelCheckpoint(run / "checkpoints", **save),
    ]
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(logger=RunHistory(run), callbacks=callbacks, **defaults | options)
    data = Digits(num_train=60, num_val=20, batch_size=20, augment=True)
    last = None
    if run.exists() and not has_not_begun(run):
        last = last_checkpoint(run)
    elif run.exists():
        clear(run)
    trainer.fit(module, data, ckpt_path=last)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), run / "weights.pt")
    return 0


def trained(run, *args, at=None, act=kill_all, **options):
    """Return the exit status of `train` in a process that is killed at a moment."""

    def go():
        if at is not None:
            interrupt(at, act)
        return train(run, *args, **options)

    return forked(go, said=said_in(run))


def run_below(folder):
    """Return a run's directory of the name that all have: figures show it."""
    run = folder / "small/run"
    run.parent.mkdir(parents=True)
    return run


def said_in(run):
    return run.with_suffix(".txt")


def said(run):
    return said_in(run).read_text()


def assert_same_runs(broken, whole):
    ours, theirs = recorded(broken), recorded(whole)
    for part in theirs:
        assert ours[part] == theirs[part], (part, said(broken))
    weights = [torch.load(run / "weights.pt") for run in (broken, whole)]
    assert_same(*weights)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            each,
            marks=[
                *([pytest.mark.ddp] if "ranks" in each else []),
                *([] if each in ("each epoch", "each step") else [pytest.mark.slow]),
            ],
        )
        for each in VARIANTS
    ],
)
def test_a_run_that_is_killed_after_each_checkpoint_is_the_unbroken_one(
    tmp_path, variant
):
    whole, broken = run_below(tmp_path / "whole"), run_below(tmp_path / "broken")
    assert trained(whole, variant) == 0, said(whole)
    kills = 0
    while trained(broken, variant, at=SAVED) == -signal.SIGKILL:
        kills += 1
        assert kills < 10, said(broken)
    assert kills >= 2, said(broken)
    assert_same_runs(broken, whole)


CLOSING = Moment(f"{PROBE}:Probe.on_train_end")
MOMENTS = {
    "before the first step": [Moment(STEP)],
    "before the first checkpoint": [Moment(STEP, 3)],
    "before it twice": [Moment(STEP, 2), Moment(STEP, 3)],
    "as the first checkpoint is written": [SAVING],
    "before a row": [Moment(ROW, 5)],
    "after a row": [Moment(ROW, 6, True)],
    "mid-epoch": [Moment(STEP, 5)],
    "mid-epoch, and mid-epoch again": [Moment(STEP, 5), Moment(STEP, 2)],
    "in validation": [Moment(VALIDATION, 2)],
    "as a later checkpoint is written": [SAVING._replace(count=2)],
    "before a checkpoint is linked": [Moment(LINK, 2)],
    "in a probe": [Moment(MEASURE, 2)],
    "in the last measurement": [Moment(MEASURE, 3), Moment(MEASURE, 1)],
    "before the closing": [CLOSING],
    "in the figures, thrice": [
        Moment(FIGURE, 4),  # three are drawn at the start
        Moment(FIGURE, 2),
        Moment(FIGURE, 3, True),
    ],
    "in the table of twins": [CLOSING._replace(count=2, after=True)],
    "as the end is written": [Moment("lit_resnorm.runs.history:summarise")],
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = run_below(tmp_path_factory.mktemp("unbroken"))
    assert trained(run, probes=[twins()]) == 0, said(run)
    assert "tables/stability/twins.jsonl" in recorded(run)["tables"]
    assert recorded(run)["figures"]
    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_at_a_moment_is_the_unbroken_one(
    unbroken, tmp_path, moment
):
    run = run_below(tmp_path)
    for at in MOMENTS[moment]:
        assert trained(run, probes=[twins()], at=at) == -signal.SIGKILL, said(run)
    assert trained(run, probes=[twins()]) == 0, said(run)
    assert_same_runs(run, unbroken)


@pytest.mark.parametrize("count", [1, 2])
def test_a_half_written_checkpoint_is_passed_over(unbroken, tmp_path, count):
    run = run_below(tmp_path)
    run.mkdir()
    at = SAVED._replace(count=count)

    def halved():
        newest = checkpoints(run)[0].resolve()
        os.truncate(newest, newest.stat().st_size // 2)
        kill_all()

    killed = trained(run, probes=[twins()], at=at, act=halved)
    assert killed == -signal.SIGKILL, said(run)
    assert trained(run, probes=[twins()]) == 0, said(run)
    assert_same_runs(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["each epoch", "each step"])
def test_fifty_kills_at_random_moments_lose_no_row(tmp_path, variant):
    draw = random.Random(variant)
    whole = run_below(tmp_path / "whole")
    began = time.monotonic()
    assert trained(whole, variant) == 0, said(whole)
    lasts, kills, number = time.monotonic() - began, 0, 0
    while kills < 25:
        run, number = run_below(tmp_path / f"{number}"), number + 1
        for _ in range(draw.randint(1, 4)):
            pid = started(lambda run=run: train(run, variant), said=said_in(run))
            time.sleep(draw.uniform(0.1, 1.2) * lasts)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert trained(run, variant) == 0, said(run)
        assert_same_runs(run, whole)


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
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": IMPORTED},
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

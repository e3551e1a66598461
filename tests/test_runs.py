import json
import math
import time

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lit_resnorm.runs import RunHistory
from lit_resnorm.runs.files import logged_config, read_run, summarise

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "max_epochs": 2,
}


class Counter(LightningModule):
    """Logs, everywhere, how many steps its weights have taken, counted by itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.diverged = False

    def training_step(self, batch, _):
        self.log("train/steps", self.steps.float())
        return (batch @ self.weight).mean()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.steps += 1

    def on_train_epoch_end(self):
        self.log("train/steps_at_epoch_end", self.steps.float())

    def validation_step(self, batch, _):
        self.log("val/steps", self.steps.float())

    def test_step(self, batch, batch_idx):
        self.log("test/steps", self.steps.float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TwoOptimizers(Counter):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        self.log("train/steps", self.steps.float())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((batch @ self.weight).mean())
            optimizer.step()
        self.steps += 1

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weight], lr=1e-3) for _ in range(2)]


class Accumulates(Counter):
    """Steps two optimizers in every third batch."""

    every = 3

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def due(self, index, batch_idx):
        return (batch_idx + 1) % self.every == 0

    def training_step(self, batch, batch_idx):
        self.log("train/steps", self.steps.float())
        self.manual_backward((batch @ self.weight).mean())
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        due = [o for i, o in enumerate(optimizers) if self.due(i, batch_idx)]
        for optimizer in due:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += bool(due)

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weight], lr=1e-3) for _ in range(2)]


class AccumulatesAlone(Accumulates):
    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1e-3)


class Alternates(Accumulates):
    """One optimizer steps in even batches but the first, the other in every fifth."""

    def due(self, index, batch_idx):
        return batch_idx and batch_idx % (5 if index else 2) == 0


class StepsTwice(AccumulatesAlone):
    """One optimizer that steps twice a batch, by closures."""

    def training_step(self, batch, batch_idx):
        self.log("train/steps", self.steps.float())
        for _ in range(2):
            self.optimizers().step(lambda: (batch @ self.weight).mean())
            self.steps += 1


class ExplicitSteps(Callback):
    """Logs as a probe does: at the step the weights have, straight to the loggers."""

    def note(self, trainer, module, key):
        steps = int(module.steps)
        for logger in trainer.loggers:
            row = {f"probe/{key}": float(steps), "epoch": trainer.current_epoch}
            logger.log_metrics(row, step=steps)

    def on_train_start(self, trainer, module):
        self.note(trainer, module, "start")

    def on_train_batch_end(self, trainer, module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.note(trainer, module, "batch_end")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.note(trainer, module, "validation_end")

    def on_train_epoch_end(self, trainer, module):
        self.note(trainer, module, "epoch_end")

    def on_train_end(self, trainer, module):
        self.note(trainer, module, "end")


class KillError(Exception):
    pass


class KillBefore(Callback):
    """Ends the process's training as abruptly as one process allows."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise KillError


class CheckpointAt(Callback):
    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


def loader(num_batches=7):
    return DataLoader(torch.ones(num_batches, 3))


def fit(path, module=None, callbacks=(), ckpt_path=None, **options):
    trainer = Trainer(
        logger=RunHistory(path),
        callbacks=[ExplicitSteps(), *callbacks],
        enable_checkpointing=False,
        **{**QUIET, **options},
    )
    trainer.fit(module or Counter(), loader(), loader(2), ckpt_path=ckpt_path)
    return trainer


def lines(path):
    text = (path / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def points(path, key):
    return [(row["step"], row[key]) for row in lines(path) if key in row]


CASES = {
    "one optimizer": (Counter, {}, 14),
    "accumulation over three batches": (Counter, {"accumulate_grad_batches": 3}, 6),
    "validation amid the epoch": (Counter, {"val_check_interval": 3}, 14),
    "two optimizers by hand": (TwoOptimizers, {}, 14),
}


@pytest.mark.parametrize(
    "module", [Accumulates, AccumulatesAlone, Alternates, StepsTwice]
)
def test_steps_are_the_optimizers_under_manual_accumulation(tmp_path, module):
    checkpoint = tmp_path / "x.ckpt"
    trainer = fit(tmp_path / "run", module(), callbacks=[CheckpointAt(9, checkpoint)])
    trainer.test(trainer.lightning_module, loader(2), verbose=False)
    fit(tmp_path / "rest", module(), ckpt_path=checkpoint)
    for name in ("run", "rest"):
        rows = lines(tmp_path / name)
        assert any("train/steps" in row for row in rows)
        assert any("probe/batch_end" in row for row in rows)
        for row in rows:
            for key in row.keys() - {"step", "epoch"}:
                assert row["step"] == row[key], row


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_every_value_is_that_of_its_weights(tmp_path, case):
    module, options, total = CASES[case]
    trainer = fit(tmp_path, module(), **options)
    trainer.test(trainer.lightning_module, loader(2), verbose=False)
    rows = lines(tmp_path)
    for row in rows:
        for key in row.keys() - {"step", "epoch"}:
            assert row["step"] == row[key], row
    assert points(tmp_path, "train/steps") == [(i, i) for i in range(total)]
    ends = [(total // 2, total / 2), (total, total)]
    assert points(tmp_path, "train/steps_at_epoch_end") == ends
    assert points(tmp_path, "val/steps")[-1][0] in (total, 13)
    assert points(tmp_path, "test/steps") == [(total, total)]
    kinds = ("start", "batch_end", "validation_end", "epoch_end", "end")
    assert {f"probe/{kind}" for kind in kinds} <= {key for row in rows for key in row}


def test_a_checkpoint_that_is_tested_is_logged_at_its_own_step(tmp_path):
    checkpoint = tmp_path / "x.ckpt"
    fit(tmp_path / "a", callbacks=[CheckpointAt(4, checkpoint)])
    trainer = Trainer(logger=RunHistory(tmp_path / "b"), **QUIET)
    trainer.test(Counter(), loader(2), ckpt_path=checkpoint, verbose=False)
    assert points(tmp_path / "b", "test/steps") == [(5, 5.0)]


@pytest.mark.parametrize("saved", [2, 6, 7])  # amid an epoch, its last, its first batch
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}])
def test_a_resumed_history_is_that_of_the_unbroken_run(tmp_path, saved, options):
    fit(tmp_path / "whole", **options)
    broken, checkpoint = tmp_path / "broken", tmp_path / "x.ckpt"
    with pytest.raises(KillError):
        fit(
            broken,
            callbacks=[CheckpointAt(saved, checkpoint), KillBefore(10)],
            **options,
        )
    with (broken / "history.jsonl").open("a") as file:
        file.write('{"step": 10, "train/st')
    fit(broken, ckpt_path=checkpoint, **options)
    keys = {key for row in lines(tmp_path / "whole") for key in row} - {"step", "epoch"}
    # on_train_start comes again, at a step that the unbroken run doesn't start at
    for key in keys - {"probe/start"}:
        assert points(broken, key) == points(tmp_path / "whole", key), key


def test_rows_after_the_checkpoint_are_dropped_and_a_kept_one_is_not_doubled(tmp_path):
    rows = [
        {"step": 6, "epoch": 0, "train/steps": 6.0},
        {"step": 7, "epoch": 0, "val/steps": 7.0},
        {"step": 7, "epoch": 0, "train/steps_at_epoch_end": 7.0},
        {"step": 7, "epoch": 1, "train/steps": -1.0},
        {"step": 8, "epoch": 1, "probe/other": -1.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/history.jsonl").write_text(text)
    fit(tmp_path / "first", callbacks=[CheckpointAt(6, tmp_path / "x.ckpt")])
    fit(tmp_path / "run", ckpt_path=tmp_path / "x.ckpt")
    assert lines(tmp_path / "run")[:3] == rows[:3]
    assert points(tmp_path / "run", "val/steps") == [(7, 7.0), (14, 14.0)]
    assert points(tmp_path / "run", "train/steps")[:2] == [(6, 6.0), (7, 7.0)]
    assert points(tmp_path / "run", "probe/other") == []


def test_a_run_without_a_checkpoint_is_refused_where_another_one_is(tmp_path):
    fit(tmp_path)
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        fit(tmp_path)
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_tables_are_cut_and_not_doubled(tmp_path):
    class Tables(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.logger.log_table("a/b", ["x"], [[math.nan]], step=int(module.steps))

    def steps():
        table = (tmp_path / "run/tables/a/b.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in table]

    checkpoint = tmp_path / "x.ckpt"
    callbacks = [Tables(), CheckpointAt(4, checkpoint), KillBefore(10)]
    with pytest.raises(KillError):
        fit(tmp_path / "run", callbacks=callbacks)
    assert steps() == list(range(1, 11))
    with (tmp_path / "run/tables/a/b.jsonl").open("a") as file:
        file.write('{"step": 1')
    fit(tmp_path / "run", callbacks=[Tables()], ckpt_path=checkpoint)
    assert steps() == list(range(1, 15))
    first = (tmp_path / "run/tables/a/b.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 1, "columns": ["x"], "data": [["NaN"]]}


def test_values_that_are_not_finite_are_words_in_the_file_and_numbers_read_back(
    tmp_path,
):
    history = RunHistory(tmp_path)
    values = {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": 2}
    history.log_metrics(values, step=3)
    history.finalize("success")
    assert lines(tmp_path) == [
        {"step": 3, "epoch": None, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
        | {"d": 2}
    ]
    row = read_run(tmp_path).history.iloc[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 2)


def test_nested_values_are_rows_under_the_names_that_wandb_shows(tmp_path):
    history = RunHistory(tmp_path)
    history.log_metrics({"train": {"loss": torch.tensor(1.0), "a": {"b": 2}}}, step=3)
    assert lines(tmp_path) == [
        {"step": 3, "epoch": None, "train.loss": 1.0, "train.a.b": 2}
    ]
    history.finalize("success")


def test_every_line_is_in_the_file_when_it_was_logged(tmp_path):
    history = RunHistory(tmp_path)
    for step in range(3):
        history.log_metrics({"a": 1.0}, step=step)
        assert len(lines(tmp_path)) == step + 1
    history.finalize("success")


def test_the_summary_says_how_the_run_ended(tmp_path):
    class Stop(Callback):
        def __init__(self, error):
            self.error = error

        def on_train_batch_end(self, trainer, *_):
            raise self.error

    fit(tmp_path / "finished")
    diverged = Counter()
    diverged.diverged = True
    fit(tmp_path / "diverged", diverged)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "failed", callbacks=[Stop(ZeroDivisionError())])
    with pytest.raises(SystemExit):
        fit(tmp_path / "interrupted", callbacks=[Stop(KeyboardInterrupt())])
    for word in ("finished", "diverged", "failed", "interrupted"):
        summary = json.loads((tmp_path / word / "summary.json").read_text())
        assert summary["status"] == word
        assert summary["seconds"] > 0
        assert {"python", "torch", "lightning", "lit-resnorm"} <= summary[
            "versions"
        ].keys()


class FinalizeAt(Callback):
    """Finalizes the loggers amid a run, as Lightning's handler of SIGUSR1 does."""

    def __init__(self, batch, word="finished"):
        self.batch, self.word = batch, word

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            for logger in trainer.loggers:
                logger.finalize(self.word)


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize("word", ["finished", "success", "failed"])
def test_amid_a_run_the_status_is_running_and_the_last_end_wins(tmp_path, word):
    said = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            if (tmp_path / "ok/summary.json").exists():
                said.append(summary_of(tmp_path / "ok")["status"])

    fit(tmp_path / "ok", callbacks=[FinalizeAt(3, word), Look()])
    assert set(said) == {"running"}
    assert summary_of(tmp_path / "ok")["status"] == "finished"
    assert summary_of(tmp_path / "ok")["values"]["train/steps"]["last"] == 13.0
    with pytest.raises(KillError):
        fit(tmp_path / "failed", callbacks=[FinalizeAt(3, word), KillBefore(10)])
    assert summary_of(tmp_path / "failed")["status"] == "failed"
    assert summary_of(tmp_path / "failed")["values"]["train/steps"]["last"] == 9.0
    module = Counter()
    module.diverged = True
    fit(tmp_path / "diverged", module, callbacks=[FinalizeAt(3, word)])
    assert summary_of(tmp_path / "diverged")["status"] == "diverged"


def test_seconds_count_the_time_before_a_finalize_amid_the_run_once(tmp_path):
    class Rest(Callback):
        def on_train_batch_end(self, trainer, *_):
            time.sleep(0.02)

    began = time.monotonic()
    fit(tmp_path, callbacks=[Rest(), *(FinalizeAt(batch) for batch in range(14))])
    assert 14 * 0.02 <= summary_of(tmp_path)["seconds"] <= time.monotonic() - began


def test_a_run_that_breaks_off_as_it_ends_has_failed(tmp_path):
    class Breaks(RunHistory):
        def finalize(self, status):
            super().finalize(status)
            if status == "success":
                raise KillError

    trainer = Trainer(logger=Breaks(tmp_path), **QUIET, enable_checkpointing=False)
    with pytest.raises(KillError):
        trainer.fit(Counter(), loader())
    assert summary_of(tmp_path)["status"] == "failed"
    trainer.logger.finalize("finished")  # whoever closes it once more mends nothing
    assert summary_of(tmp_path)["status"] == "failed"


def test_a_run_that_goes_on_is_running_until_it_ends_again(tmp_path):
    checkpoint, said = tmp_path / "x.ckpt", []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            said.append(summary_of(tmp_path / "run")["status"])

    fit(tmp_path / "run", callbacks=[CheckpointAt(4, checkpoint)])
    fit(tmp_path / "run", callbacks=[Look()], ckpt_path=checkpoint)
    assert set(said) == {"running"}
    assert summary_of(tmp_path / "run")["status"] == "finished"
    # a kill leaves the word, and readers say what the process came to
    summary = {**summary_of(tmp_path / "run"), "status": "running"}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    assert read_run(tmp_path / "run").summary["status"] == "interrupted"


def test_a_damaged_summary_is_told_and_written_anew(tmp_path):
    (tmp_path / "summary.json").write_text("{ a: [")
    with pytest.warns(UserWarning, match=r"summary\.json is damaged"):
        fit(tmp_path)
    assert summary_of(tmp_path)["status"] == "finished"


def test_a_test_leaves_the_status_of_the_training_and_adds_its_values(tmp_path):
    module = Counter()
    module.diverged = True
    trainer = fit(tmp_path, module)
    trainer.logger.log_verdict("moments/pathology", "noise")
    module.diverged = False
    trainer.test(module, loader(2), verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert summary["values"]["test/steps"]["last"] == 14.0
    assert summary["verdicts"] == {"moments/pathology": "noise"}


def test_the_summary_of_a_history_by_hand():
    rows = [
        {"step": 0, "epoch": 0, "a": 2.0, "b": "NaN"},
        {"step": 1, "epoch": 0, "a": "NaN"},
        {"step": 2, "epoch": 0, "a": "Infinity"},
        {"step": 3, "epoch": 0, "a": -1.0},
        {"step": 4, "epoch": 0, "a": -1.0},
    ]
    assert summarise(rows) == {
        "a": {
            "last": -1.0,
            "min": -1.0,
            "step_of_min": 3,
            "max": "Infinity",
            "step_of_max": 2,
        },
        "b": {
            "last": "NaN",
            "min": None,
            "step_of_min": None,
            "max": None,
            "step_of_max": None,
        },
    }


def test_a_figure_is_a_png_under_its_key(tmp_path):
    RunHistory(tmp_path).log_image("activation/rate", [Figure(), Figure()], step=1)
    for name in ("rate.png", "rate.1.png"):
        assert (tmp_path / "figures/activation" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("key", ["../out", "/etc/out"])
def test_a_key_cannot_lead_out_of_the_run_directory(tmp_path, key):
    with pytest.raises(ValueError, match="leads out of tables"):
        RunHistory(tmp_path).log_table(key, ["x"], [[1]], step=0)


def test_a_run_is_read_back(tmp_path):
    history = RunHistory(tmp_path / "name")
    history.log_hyperparams({"lr": 0.1})
    history.log_hyperparams({"depth": 3})
    history.log_metrics({"a": 1.0}, step=0)
    history.log_metrics({"b": 2.0}, step=1)
    history.finalize("success")
    run = read_run(tmp_path / "name")
    assert run.name == "name"
    assert run.config == {"lr": 0.1, "depth": 3}
    assert list(run.history.columns) == ["step", "epoch", "a", "b"]
    assert run.history["step"].tolist() == [0, 1]
    assert run.summary["status"] == "interrupted"
    assert run.summary["values"]["b"]["last"] == 2.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ('{"step": 1}\n{"ste\n{"step": 2}\n', "history.jsonl, line 2: no JSON"),
        ('{"step": 1}\n[1]\n', "line 2: no object with a whole 'step'"),
        (None, "no run directory"),
    ],
)
def test_a_damaged_run_directory_is_named_with_the_line(tmp_path, damage, message):
    if damage is not None:
        (tmp_path / "history.jsonl").write_text(damage)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_damaged_config_or_summary_is_named(tmp_path, name):
    (tmp_path / "history.jsonl").write_text("")
    (tmp_path / name).write_text("{ a: [")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_run(tmp_path)


def test_the_logged_config_has_the_flat_names_beside_the_nested_whole():
    config = yaml.safe_load("""
        seed_everything: 3
        model:
          class_path: lit_resnorm.modules.LitResNetBN
          init_args:
            depth: 5
            width: 64
            optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
        data: {class_path: lit_resnorm.data.Digits, init_args: {batch_size: 32}}
    """)
    assert logged_config(config) == {
        "variant": "LitResNetBN",
        "depth": 5,
        "width": 64,
        "data": "Digits",
        "optimizer": "SGD",
        "lr": 0.1,
        "batch_size": 32,
        "seed": 3,
        "config": config,
    }


def test_a_logger_without_a_directory_is_refused():
    with pytest.raises(ValueError, match="save_dir is None"):
        RunHistory()


@pytest.mark.ddp
def test_only_rank_zero_writes(tmp_path):
    trainer = Trainer(
        logger=RunHistory(tmp_path),
        enable_checkpointing=False,
        **{**QUIET, "devices": 2, "strategy": "ddp_fork"},
    )
    trainer.fit(Counter(), loader(), loader(2))
    assert points(tmp_path, "val/steps") == [(4, 4.0), (8, 8.0)]
    assert points(tmp_path, "train/steps") == [(i, i) for i in range(8)]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"

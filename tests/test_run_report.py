"""RunReport: the page of one run, at the end of it."""

import json
import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from small import FunctionalNet, loaders, quiet_trainer

from lit_resnorm.cli import main
from lit_resnorm.compare import RunReport
from lit_resnorm.runs import RunHistory


def fit(callback, logger, module=None, **options):
    module = module or FunctionalNet()
    trainer = quiet_trainer(
        callbacks=[callback], logger=logger, **({"max_epochs": 2} | options)
    )
    trainer.fit(module, *loaders())
    return trainer


def document(path):
    found = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', path.read_text()
    )
    return json.loads(found[1])


class Stops(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            raise self.error


class Diverges(FunctionalNet):
    diverged = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 10:
            self.diverged = self.trainer.should_stop = True
        return loss


class Elsewhere(Logger):
    name = version = "elsewhere"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_the_page_holds_the_whole_run_and_how_it_ended(tmp_path):
    fit(RunReport(), RunHistory(tmp_path))
    page = document(tmp_path / "report.html")
    (run,) = page["runs"]
    assert run["status"] == "finished"
    (series,) = page["series"]["loss"]
    assert series["step"] == list(range(16))


def test_a_fit_ends_with_the_path_of_its_report(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "LitMLP", "--model.depth", "1", "--model.width", "4"]
    words += ["--data", "Digits", "--trainer.max_steps", "1", "--run", "a"]
    words += ["--trainer.logger", "lit_resnorm.runs.RunHistory"]
    words += ["--trainer.callbacks", "lit_resnorm.compare.RunReport"]
    with caplog.at_level("INFO"):
        assert main(["fit", *words]) == 0
    run, report = (record.getMessage() for record in caplog.records[-2:])
    assert run.startswith("Run directory: ")
    assert (
        report == f"Report, to open in a browser: {run.partition(': ')[2]}/report.html"
    )
    assert (tmp_path / report.partition(": ")[2]).is_file()


def test_a_diverged_run_is_said_to_be_one(tmp_path):
    fit(RunReport(), RunHistory(tmp_path), Diverges())
    (run,) = document(tmp_path / "report.html")["runs"]
    assert run["status"] == "diverged"


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (RuntimeError("no memory"), RuntimeError, "failed"),
        (KeyboardInterrupt(), SystemExit, "interrupted"),
    ],
)
def test_a_run_that_is_broken_off_gets_its_page(tmp_path, error, raised, status):
    trainer = quiet_trainer(
        callbacks=[Stops(error), RunReport()], logger=RunHistory(tmp_path), max_epochs=2
    )
    with pytest.raises(raised):
        trainer.fit(FunctionalNet(), *loaders())
    page = document(tmp_path / "report.html")
    assert page["runs"][0]["status"] == status
    assert page["series"]["loss"][0]["step"] == list(range(9))


def test_a_test_after_the_fit_comes_onto_the_page(tmp_path):
    trainer = fit(RunReport(), RunHistory(tmp_path))
    trainer.test(trainer.lightning_module, loaders()[1], verbose=False)
    page = document(tmp_path / "report.html")
    assert page["series"]["test"][0]["step"] == [16]
    assert page["runs"][0]["status"] == "finished"


def test_a_path_says_where_the_page_goes(tmp_path):
    path = tmp_path / "pages" / "mine.html"
    fit(RunReport(path), RunHistory(tmp_path / "run"))
    assert document(path)["runs"][0]["status"] == "finished"
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_csv_log_of_another_project_does_as_well(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(RunReport(), logger)
    page = document(tmp_path / "lightning_logs" / "version_0" / "report.html")
    assert page["series"]["loss"][0]["step"][0] == 0


def test_loggers_that_leave_no_log_to_read_are_refused_at_set_up():
    with pytest.raises(ValueError, match="neither a RunHistory nor a CSVLogger"):
        fit(RunReport(), Elsewhere())


def test_a_run_that_never_began_leaves_no_page_and_no_complaint(tmp_path, recwarn):
    class Refuses(L.Callback):
        def on_fit_start(self, *_):
            raise ValueError("it can't be measured")

    trainer = quiet_trainer(
        callbacks=[RunReport(), Refuses()], logger=RunHistory(tmp_path), max_epochs=1
    )
    with pytest.raises(ValueError, match="it can't be measured"):
        trainer.fit(FunctionalNet(), *loaders())
    assert not (tmp_path / "report.html").exists()
    assert not [one for one in recwarn if "RunReport" in str(one.message)]


def test_nothing_is_written_under_fast_dev_run_or_without_a_logger(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fit(RunReport(), RunHistory(tmp_path / "run"), fast_dev_run=True)
    fit(RunReport(), False)
    assert list(tmp_path.rglob("*.html")) == []


def test_a_page_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "report.html.new").mkdir()
    with pytest.warns(UserWarning, match="RunReport: no page was written") as caught:
        trainer = fit(RunReport(), RunHistory(tmp_path))
    assert sum("RunReport" in str(one.message) for one in caught) == 1
    assert trainer.global_step == 16
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_the_training_is_the_same_with_the_report(tmp_path):
    weights = []
    for name in ("with", "without"):
        torch.manual_seed(0)
        callbacks = [RunReport()] if name == "with" else []
        trainer = quiet_trainer(
            callbacks=callbacks, logger=RunHistory(tmp_path / name), max_epochs=2
        )
        module = FunctionalNet()
        trainer.fit(module, *loaders())
        weights.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *weights))


@pytest.mark.ddp
def test_of_two_ranks_the_first_writes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(RunReport(), RunHistory(tmp_path), devices=2, strategy="ddp_fork")
    (run,) = document(tmp_path / "report.html")["runs"]
    assert run["status"] == "finished"

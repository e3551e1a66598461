"""The Fisher matrix's spectrum at a training's ends, and lambda_max between."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from small import FunctionalNet, loaders, quiet_trainer
from test_probe_contract import Recorder, fit

from lit_resnorm_callbacks import FIMEigenvalueProbe


def probe(spectrum, cadence=2, **options):
    return FIMEigenvalueProbe(
        spectrum=spectrum, cadence=cadence, num_examples=8, **options
    )


def logged(recorder):
    """What a recorder was given, by step and key; each once."""
    values = {}
    for step, row in recorder.rows:
        for key, value in row.items():
            if key.startswith("fim/") and not key.endswith("/seconds"):
                assert (step, key) not in values
                values[step, key] = float(value)
    return values


def steps(values, key):
    return sorted(step for step, one in values if one == key)


@pytest.fixture(scope="module")
def runs():
    found = {}
    for spectrum in ("ends", "always", "never"):
        recorder = Recorder()
        fit([probe(spectrum, log="all")], steps=5, logger=recorder)
        found[spectrum] = logged(recorder)
    return found


@pytest.mark.parametrize("key", ["top/01", "top/10", "lambda_max/000.first"])
def test_the_spectrum_and_the_layers_are_measured_when_asked_for(runs, key):
    assert steps(runs["ends"], f"fim/{key}") == [0, 5]
    assert steps(runs["always"], f"fim/{key}") == [0, 2, 4, 5]
    assert steps(runs["never"], f"fim/{key}") == []


def test_traces_and_the_largest_eigenvalue_are_measured_always(runs):
    for values in runs.values():
        for key in ("trace", "lambda_mean", "lambda_max", "trace/000.first"):
            assert steps(values, f"fim/{key}") == [0, 2, 4, 5]


def test_values_agree_whenever_the_spectrum_is_measured(runs):
    always = runs["always"]
    for spectrum in ("ends", "never"):
        both = [
            at
            for at in runs[spectrum].keys() & always.keys()
            if not at[1].endswith(("residual", "saturated", "optimizer_kind"))
        ]
        assert len(both) > 30
        for at in both:
            # both are within tol, 1e-5, of the same number
            assert runs[spectrum][at] == pytest.approx(always[at], rel=3e-5), at


class StopsAt(L.Callback):
    """Ends a training after an epoch, where no limit of the Trainer does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step


def test_an_end_that_nobody_foresaw_adds_the_spectrum_to_what_was_measured():
    recorder = Recorder()
    fit([probe("ends"), StopsAt(8)], steps=20, logger=recorder)
    values = logged(recorder)
    assert steps(values, "fim/lambda_max") == [0, 2, 4, 6, 8]
    assert steps(values, "fim/top/01") == [0, 8]


def test_a_resumed_run_measures_the_spectrum_at_its_end(tmp_path):
    kept = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    fit([probe("ends"), kept], steps=2, enable_checkpointing=True)
    recorder = Recorder()
    trainer = quiet_trainer(max_steps=6, callbacks=[probe("ends")], logger=recorder)
    trainer.fit(FunctionalNet(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    values = logged(recorder)
    assert steps(values, "fim/lambda_max") == [4, 6]
    assert steps(values, "fim/top/01") == [6]


def test_an_evaluation_measures_the_spectrum():
    trainer = quiet_trainer(callbacks=[probe("ends")])
    trainer.validate(FunctionalNet(), loaders()[1], verbose=False)
    assert "fim/top/01" in trainer.callback_metrics


def test_another_word_for_when_is_refused_with_the_words_there_are():
    with pytest.raises(
        ValueError, match=r"spectrum is 'often'; .* ends, always, never"
    ):
        FIMEigenvalueProbe(spectrum="often")

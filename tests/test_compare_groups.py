"""Which runs `lit-resnorm compare` averages unasked, and the names of groups."""

import pytest
import yaml
from handmade_runs import document, losses, make_run


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def callback(path, **options):
    return [{"class_path": path, "init_args": options}]


def labels(found):
    return [group["label"] for group in found["groups"]]


TOLD = {
    "a number": ("gradient_clip_val", 0.1, 10.0),
    "a number or none": ("gradient_clip_val", None, 10.0),
    "length": ("max_epochs", 1, 2),
    "precision": ("precision", None, "16-mixed"),
    "devices": ("devices", 1, 2),
    "a setting that only a later version knows": ("new", ..., 2),
    "a callback that trains": (
        "callbacks",
        callback("lightning.pytorch.callbacks.EarlyStopping", patience=1),
        callback("lightning.pytorch.callbacks.EarlyStopping", patience=2),
    ),
    "a callback that one run has": (
        "callbacks",
        None,
        callback("lightning.pytorch.callbacks.StochasticWeightAveraging"),
    ),
    "a callback of a user": (
        "callbacks",
        callback("mine.Average", decay=0.9),
        callback("mine.Average", decay=0.99),
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_runs_that_differ_in_what_may_change_training_are_not_averaged(tmp_path, case):
    key, *values = TOLD[case]
    for name, value in zip("ab", values, strict=True):
        settings = {} if value is ... else {key: value}
        make_run(tmp_path / name, losses(1.0), **settings)
    found = document(tmp_path)
    assert [group["runs"] for group in found["groups"]] == [[0], [1]]
    assert len(set(labels(found))) == 2


def test_labels_give_settings_of_the_trainer_by_their_short_names(tmp_path):
    for name, value in (("a", 0.1), ("b", 10.0)):
        make_run(tmp_path / name, losses(1.0), gradient_clip_val=value)
    assert labels(document(tmp_path)) == [
        "LitResNet, gradient_clip_val 0.1",
        "LitResNet, gradient_clip_val 10.0",
    ]


def test_a_callback_that_one_run_has_names_its_group_and_is_a_difference(tmp_path):
    path = "lightning.pytorch.callbacks.StochasticWeightAveraging"
    make_run(tmp_path / "a", losses(1.0), callbacks=None)
    make_run(tmp_path / "b", losses(1.0), callbacks=callback(path, swa_lrs=0.1))
    found = document(tmp_path)
    assert labels(found) == ["LitResNet", "LitResNet, StochasticWeightAveraging"]
    assert found["differences"] == [
        {"key": "trainer.callbacks.StochasticWeightAveraging", "values": [None, path]}
    ]


WATCHING = {
    "rows": ("log_every_n_steps", 1, 50),
    "a bar": ("enable_progress_bar", True, False),
    "checkpoints": ("enable_checkpointing", None, False),
    "a profiler": ("profiler", None, "simple"),
    "a probe": (
        "callbacks",
        callback("lit_resnorm_callbacks.StabilityProbe", method="twins"),
        callback("lit_resnorm_callbacks.StabilityProbe", method="influence"),
    ),
    "a probe that one run has": (
        "callbacks",
        None,
        callback("lit_resnorm_callbacks.fim_eigenvalues.FIMEigenvalueProbe"),
    ),
    "a monitor of Lightning's": (
        "callbacks",
        callback("lightning.pytorch.callbacks.LearningRateMonitor"),
        callback("lightning.pytorch.callbacks.ModelCheckpoint", save_top_k=2),
    ),
}


@pytest.mark.parametrize("case", WATCHING)
def test_what_only_watches_splits_no_group(tmp_path, case):
    key, *values = WATCHING[case]
    for seed, value in enumerate(values):
        make_run(tmp_path / str(seed), losses(1.0), seed=seed, **{key: value})
    (group,) = document(tmp_path)["groups"]
    assert group["runs"] == [0, 1]


def foreign(folder, **hparams):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,val_acc\n0,0.5\n")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams))


def test_a_run_of_another_project_leaves_our_groups_and_their_labels(tmp_path):
    for seed in (0, 1):
        for lr in (0.1, 0.2):
            path = tmp_path / "ours" / f"{lr}-{seed}"
            probe = callback("lit_resnorm_callbacks.StabilityProbe", cadence=seed + 1)
            make_run(path, losses(1.0), seed=seed, lr=lr, callbacks=probe)
    foreign(tmp_path / "theirs" / "logs", lr=0.5, seed=7, hidden=16)
    alone = document(tmp_path / "ours")
    mixed = document(tmp_path / "theirs", tmp_path / "ours")
    assert labels(alone) == ["LitResNet, lr 0.1", "LitResNet, lr 0.2"]
    assert labels(mixed) == ["theirs/logs", *labels(alone)]
    assert [g["runs"] for g in mixed["groups"]] == [[0], [1, 2], [3, 4]]
    assert [g["key"] for g in mixed["groups"][1:]] == [
        g["key"] for g in alone["groups"]
    ]


def test_runs_of_another_project_beside_ours_are_averaged_over_seeds(tmp_path):
    make_run(tmp_path / "ours", losses(1.0))
    for seed in (0, 1):
        foreign(tmp_path / "theirs" / str(seed), lr=0.5, seed=seed)
    foreign(tmp_path / "theirs" / "other", lr=0.9, seed=0)
    found = document(tmp_path)
    assert [group["runs"] for group in found["groups"]] == [[0], [1, 2], [3]]
    assert labels(found) == ["LitResNet", "theirs/0 and 1 more", "theirs/other"]


def test_runs_that_recorded_no_setting_are_not_averaged(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    groups = document(tmp_path / "a", tmp_path / "b")["groups"]
    assert [group["runs"] for group in groups] == [[0], [1]]

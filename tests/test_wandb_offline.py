import math
import shutil

import pytest
import wandb
from offline import complete

from lit_resnorm.compare import read_runs
from lit_resnorm.runs.wandb_offline import read_offline_wandb


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two processes: the second logs steps 2 and 3, step 2 again."""
    folder = tmp_path_factory.mktemp("recorded")
    # a run that another test left open would be taken for these
    settings = wandb.Settings(silent=True, reinit="finish_previous")
    for steps, config in (((0, 1, 2), {"lr": 0.1}), ((2, 3), {"depth": 3})):
        run = wandb.init(
            id="one",
            name="name",
            project="p",
            dir=folder,
            config=config,
            mode="offline",
            settings=settings,
        )
        for step in steps:
            values = {"a": step + len(steps) / 10, "only": math.nan}
            values = values if len(steps) == 2 or step != 2 else {**values, "b": 7}
            run.log({**values, "trainer/global_step": step})
        run.log({"t": wandb.Table(columns=["x"], data=[[1]]), "trainer/global_step": 3})
        run.finish()
    other = wandb.init(
        id="two", project="p", dir=folder, mode="offline", settings=settings
    )
    other.log({"a": 1.0})
    other.finish(exit_code=1)
    complete(folder)
    return folder


def test_runs_are_grouped_by_id_and_the_later_process_wins(recorded):
    one, two = read_offline_wandb(recorded)
    assert (one.name, one.config) == ("name", {"lr": 0.1, "depth": 3})
    history = one.history.set_index("step")
    assert history.index.tolist() == [0, 1, 2, 3]
    assert history["a"].tolist() == [0.3, 1.3, 2.2, 3.2]
    assert history.loc[2, "b"] == 7
    assert history["only"].isna().all()
    assert one.summary["status"] == "finished"
    assert one.summary["values"]["only"]["last"] == "NaN"
    assert two.summary["status"] == "failed"


def test_a_file_a_run_and_a_folder_of_runs_lead_to_the_same(recorded):
    ((first, *_),) = [sorted((recorded / "wandb").glob("offline-run-*-one"))]
    expected = read_offline_wandb(recorded)[0].history
    for path in (first, first / "run-one.wandb"):
        (run,) = read_offline_wandb(path)
        assert run.history.equals(expected)
    assert len(read_offline_wandb(recorded / "wandb")) == 2


def test_two_processes_of_a_run_in_one_second_are_one_run(recorded, tmp_path):
    first, second = sorted((recorded / "wandb").glob("offline-run-*-one*"))
    for source, name in ((first, "one"), (second, "one-1")):
        shutil.copytree(source, tmp_path / f"offline-run-20260101_000000-{name}")
    (run,) = read_offline_wandb(tmp_path)
    assert run.history.equals(read_offline_wandb(recorded)[0].history)


def copied(recorded, tmp_path, change):
    (source,) = (recorded / "wandb").glob("offline-run-*-two/*.wandb")
    folder = tmp_path / "offline-run-20260101_000000-two"
    folder.mkdir()
    (folder / source.name).write_bytes(change(source.read_bytes()))
    return folder


@pytest.mark.parametrize("kept", [0, 3, 7, 100, -1, -60])
def test_a_torn_tail_is_left_out(recorded, tmp_path, kept):
    folder = copied(recorded, tmp_path, lambda content: content[:kept])
    (run,) = read_offline_wandb(folder)
    assert run.summary["status"] == "interrupted"


def test_a_damaged_file_is_named_with_the_place(recorded, tmp_path):
    def flipped(content):
        return content[:40] + bytes([content[40] ^ 1]) + content[41:]

    folder = copied(recorded, tmp_path, flipped)
    with pytest.raises(ValueError, match=r"run-two\.wandb is damaged at byte \d+"):
        read_offline_wandb(folder)


def test_what_is_no_run_is_refused(recorded, tmp_path):
    with pytest.raises(ValueError, match="no offline W&B run"):
        read_offline_wandb(tmp_path)
    folder = copied(recorded, tmp_path, lambda _: b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="is no W&B run file"):
        read_offline_wandb(folder)


def test_what_was_logged_after_the_checkpoint_of_a_resume_is_dropped(tmp_path):
    settings = wandb.Settings(silent=True, reinit="finish_previous")
    for steps, config in (((0, 1, 2, 3, 4), {}), ((3,), {"resumed_from_step": 2})):
        run = wandb.init(
            id="r",
            project="p",
            dir=tmp_path,
            config={"lr": 1},
            mode="offline",
            settings=settings,
        )
        run.config.update(config)
        for step in steps:
            run.log({"a": step + len(steps), "trainer/global_step": step})
        run.finish()
    complete(tmp_path)
    (run,) = read_offline_wandb(tmp_path)
    assert run.history["step"].tolist() == [0, 1, 2, 3]
    assert run.history["a"].tolist() == [5, 6, 7, 4]
    assert run.config == {"lr": 1}


def test_nested_values_are_read_by_their_paths_and_media_are_not(tmp_path):
    settings = wandb.Settings(silent=True, reinit="finish_previous")
    run = wandb.init(project="p", dir=tmp_path, mode="offline", settings=settings)
    for step, loss in enumerate([1.0, math.nan, math.inf]):
        values = {"train": {"loss": loss, "by": {"layer": step}}, "val/loss": step}
        media = {"media": {"spectrum": wandb.Histogram([1.0, 2.0])}, "list": [1, 2]}
        run.log({**values, **media, "trainer/global_step": step})
    run.finish()
    complete(tmp_path)
    (read,) = read_offline_wandb(tmp_path)
    columns = ["step", "epoch", "train.loss", "train.by.layer", "val/loss"]
    assert sorted(read.history.columns) == sorted(columns)
    assert read.history["train.by.layer"].tolist() == [0, 1, 2]
    assert read.summary["values"]["train.loss"]["last"] == "Infinity"
    (compared,), _ = read_runs([str(tmp_path / "wandb")])
    series = compared.series["train.loss"].value
    assert series[0] == 1
    assert math.isnan(series[1])
    assert math.isinf(series[2])


def test_the_last_process_of_a_run_says_how_it_ended(tmp_path):
    settings = wandb.Settings(silent=True, reinit="finish_previous")
    for said, code in (("finished", 0), ("running", 1)):
        run = wandb.init(
            id="r", project="p", dir=tmp_path, mode="offline", settings=settings
        )
        run.log({"a": 1.0})
        run.summary.update({"status": said, "seconds": 1})
        run.finish(exit_code=code)
    complete(tmp_path)
    (read,) = read_offline_wandb(tmp_path)
    assert read.summary["status"] == "failed"

"""What W&B is given for comparing runs, and comparing what it recorded offline."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from offline import complete, records
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from lit_resnorm.cli import main
from lit_resnorm.compare import comparison_document, read_runs
from lit_resnorm.compare.columns import declared_of
from lit_resnorm.compare.online import recorded_online
from lit_resnorm.compare.workspace import make_report, make_workspace, specification
from lit_resnorm.quantities import SITE_KEY
from lit_resnorm.runs.wandb_offline import _nested, read_offline_wandb

ROOT = Path(__file__).resolve().parents[1]
FIT = [
    *("fit", "--experiment", "two", "--test_after_fit", "true"),
    *("--model", "LitResNetBN", "--model.depth", "8", "--model.width", "8"),
    *("--data.num_train", "60", "--data.batch_size", "20"),
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_model_summary", "false"),
]
PROBES = [
    f"--config={ROOT}/configs/callbacks/{name}.yaml"
    for name in ("fim_eigenvalues", "moment_tracer", "activation_rate")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that finished and one that diverged, with all probes and W&B offline."""
    folder = tmp_path_factory.mktemp("trained")
    root = ["--trainer.default_root_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, *PROBES, *root, "--run", "good"]) == 0
        worse = ["--model=LitMLP", "--model.optimizer.lr=1e30", "--model.loss=mse"]
        worse += ["--trainer.max_epochs=9"]
        assert main([*FIT, *PROBES, *root, *worse, "--run", "bad"]) == 3
    complete(folder)
    return folder / "two"


def records_of(run):
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    return records(file)


def summary_of(run):
    summary = {}
    for kind, record in records_of(run):
        if kind == "summary":
            for item in record.summary.update:
                key = tuple(item.nested_key) or (item.key,)
                summary[key] = json.loads(item.value_json)
    return summary


def test_offline_runs_give_the_numbers_of_run_directories(trained, capsys):
    found = []
    for words in (
        [trained / "good", trained / "bad"],
        [trained / "good/wandb", trained / "bad/wandb"],
    ):
        runs, skipped = read_runs(map(str, words))
        assert not skipped
        document = comparison_document(runs)
        for run in document["runs"]:
            del run["source"], run["kind"]
        found.append({k: v for k, v in document.items() if k != "made"})
        assert main(["compare", *map(str, words), "--out", ""]) == 0
    assert found[0] == found[1]
    printed = capsys.readouterr().out
    half = len(printed) // 2
    assert printed[:half] == printed[half:]
    assert [run["status"] for run in found[0]["runs"]] == ["finished", "diverged"]
    columns = {column["key"] for column in found[0]["columns"]}
    assert {"val/accuracy", "fim/lambda_max", "moments/effective_rank"} <= columns
    assert found[0]["depth"]["fim/lambda_max"]


def test_a_run_resumed_from_an_earlier_checkpoint_is_the_same_in_w_and_b(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    assert main([*FIT, *keep, "--run", "r", "--trainer.max_epochs", "3"]) == 0
    first = "runs/two/r/checkpoints/epoch=0-step=3.ckpt"
    again = [*FIT, *keep, "--run", "r", "--ckpt_path", first]
    assert main([*again, "--model.optimizer.lr", "0.03"]) == 0
    complete("runs")
    (run,), _ = read_runs(["runs/two/r"])
    (recorded,), _ = read_runs(["runs/two/r/wandb"])
    assert run.series["val/loss"].step.tolist() == [3, 6]
    documents = [comparison_document([one]) for one in (run, recorded)]
    for part in ("series", "table", "findings", "same"):
        assert documents[0][part] == documents[1][part]
    assert (recorded.status, recorded.seconds) == (run.status, run.seconds)


def test_an_offline_run_in_its_run_directory_counts_once(trained):
    for words in ([trained], [trained / "good/wandb", trained]):
        runs, _ = read_runs(map(str, words))
        assert sorted((run.name, run.kind) for run in runs) == [
            ("bad", "directory"),
            ("good", "directory"),
        ]


def test_a_torn_offline_run_is_compared_as_far_as_it_came(trained, tmp_path):
    shutil.copytree(trained / "good/wandb", tmp_path / "wandb", symlinks=True)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    places = [found.start() for found in re.finditer(b"train/loss", content)]
    file.write_bytes(content[: places[len(places) // 2]])
    (run,), skipped = read_runs([str(tmp_path)])
    assert not skipped
    assert run.status == "interrupted"
    assert 0 < len(run.series["train/loss"].step) < 6


def test_w_and_b_gets_what_groups_and_filters_need(trained):
    run = next(
        record.run for kind, record in records_of(trained / "good") if kind == "run"
    )
    assert (run.display_name, run.run_group) == ("good", "two")
    assert run.job_type == "LitResNetBN"
    assert set(run.tags) == {"LitResNetBN", "Digits", "two"}
    (recorded,) = read_offline_wandb(trained / "good/wandb")
    assert recorded.config["depth"] == 8
    assert recorded.config["config"]["model"]["init_args"]["depth"] == 8


def test_the_summary_has_min_max_and_last_the_status_and_verdicts(trained):
    (recorded,) = read_offline_wandb(trained / "good/wandb")
    summary = summary_of(trained / "good")
    for key in ("val/loss", "val/accuracy", "train/loss", "fim/lambda_max"):
        column = recorded.history[key].dropna()
        expected = {"min": column.min(), "max": column.max(), "last": column.iloc[-1]}
        assert summary[(key,)] == expected
    assert summary[("status",)] == "finished"
    assert summary[("moments/pathology/word",)] in ("none", "signal", "snr")
    assert summary_of(trained / "bad")[("status",)] == "diverged"
    assert {"min", "max", "last"} == {*summary[("fim/lambda_max/worst",)]}
    assert not [key for (key, *_) in summary if SITE_KEY.fullmatch(key)]


def test_every_metric_has_the_axis_of_optimizer_steps(trained):
    axes = {
        record.metric.name or record.metric.glob_name: record.metric.step_metric
        for kind, record in records_of(trained / "good")
        if kind == "metric"
    }
    assert axes.pop("trainer/global_step") == ""
    assert set(axes.values()) == {"trainer/global_step"}
    assert {"*", "val/loss", "moments/pathology"} <= axes.keys()


def test_validation_is_at_the_step_of_the_history(trained):
    (recorded,) = read_offline_wandb(trained / "good/wandb")
    column = recorded.history.set_index("step")["val/loss"].dropna()
    assert column.index.tolist() == [3, 6]


def test_by_depth_records_and_spectra_are_tables(trained):
    rows = [
        _nested(record.history.item)
        for kind, record in records_of(trained / "good")
        if kind == "history"
    ]
    kinds = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict):
                kinds.setdefault(key, []).append(value)
    tables = {key for key in kinds if not key.startswith("figures/")}
    named = {"activation/by_depth", "moments/by_depth", "fim/by_depth", "fim/spectrum"}
    assert tables == named
    assert {kinds[key][0]["_type"] for key in tables} == {"table-file"}
    # at the start and at the end
    assert {len(kinds[key]) for key in kinds.keys() - tables} == {2}


def test_numbers_and_figures_have_different_keys(trained):
    kinds = {}
    for kind, record in records_of(trained / "good"):
        if kind == "history":
            for key, value in _nested(record.history.item).items():
                kinds.setdefault(key, set()).add(isinstance(value, dict))
    assert "figures/fim/lambda_max" in kinds
    assert all(len(found) == 1 for found in kinds.values())


def test_the_fisher_probe_measures_when_the_command_line_starts_it(trained):
    (run,), _ = read_runs([str(trained / "good")])
    assert "fim/failed" not in run.series
    assert (run.series["fim/lambda_max"].value > 0).all()


def test_runs_of_the_server_are_read_like_the_others(trained):
    (expected,), _ = read_runs([str(trained / "good" / "wandb")])
    (recorded,) = read_offline_wandb(trained / "good" / "wandb")
    rows = recorded.history.drop(columns="epoch").to_dict("records")
    run = SimpleNamespace(
        id="x",
        name="good",
        state="finished",
        config={**recorded.config, "_wandb": {}},
        summary={"status": "diverged", "_wandb": {"runtime": 3}},
        scan_history=lambda: (
            {"_step": i, "trainer/global_step": row.pop("step"), "_runtime": 1.0}
            | {key: value for key, value in row.items() if value == value}
            for i, row in enumerate(rows)
        ),
    )
    found = recorded_online(run, "e/p/x")
    assert (found.kind, found.status, found.seconds) == ("online", "diverged", 3)
    assert found.config == expected.config
    assert {k: v.value.tolist() for k, v in found.series.items()} == {
        k: v.value.tolist() for k, v in expected.series.items()
    }


def test_nested_values_and_a_status_amid_the_run_are_read_from_the_server():
    run = SimpleNamespace(
        id="x",
        name="x",
        state="crashed",
        config={},
        summary={"status": "running"},
        scan_history=lambda: [{"_step": 4, "train": {"loss": 2.0}, "_x": {"y": 1}}],
    )
    found = recorded_online(run, "e/p/x")
    assert [*found.series] == ["train.loss"]
    assert found.series["train.loss"].step.tolist() == [4]
    assert found.status == "failed"


def test_one_bad_run_on_the_server_hinders_no_other(monkeypatch):
    def run(name, rows, **changes):
        whole = {"state": "finished", "config": {}, "summary": {}, **changes}
        return SimpleNamespace(id=name, name=name, scan_history=lambda: rows, **whole)

    row = {"_step": 0, "loss": 1.0}
    deep = []
    for _ in range(500):
        deep = [deep]
    bad = [
        run("no rows", []),
        run("step of text", [{**row, "_step": "x"}]),
        run("step beyond int64", [{**row, "_step": 2**70}]),
        run("value beyond float", [{**row, "loss": 10**400}]),
        run("status", [row], summary={"status": []}),
        run("seconds", [row], summary={"_wandb": {"runtime": float("inf")}}),
        run("config", [row], config={"a": deep}),
        run("no config", [row], config=None),
        run("no row", [5]),
    ]
    runs = [(f"e/p/{one.name}", one) for one in [*bad, run("good", [row])]]
    monkeypatch.setattr("lit_resnorm.compare.sources.online_runs", lambda _: runs)
    found, skipped = read_runs(["e/p"])
    assert [one.name for one in found] == ["good"]
    assert [one["name"] for one in skipped] == [f"e/p/{one.name}" for one in bad]


def test_a_project_without_a_connection_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["compare", "entity/project"]) == 1
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith("wandb:")
    ]
    (line,) = lines
    assert "entity/project: no such file or directory" in line
    assert "wandb login" in line


def test_workspace_and_report_are_written_where_they_cannot_be_saved(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["compare", "me/mine", "--workspace", "--report"]) == 0
    names = ["report.me.mine.json", "workspace.me.mine.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    printed = capsys.readouterr().out
    for name in names:
        assert name in printed
        text = (tmp_path / name).read_text()
        assert "^fim(_batch)?/lambda_max$" in text
        assert "trainer/global_step" in text
        assert "^moments(_batch)?/effective_rank/" in text


def test_panels_ask_for_keys_that_runs_have(trained):
    (run,), _ = read_runs([str(trained / "good")])
    keys = [*run.series, *(f"{name}/001.x" for name in run.depth)]
    keys += ["stability/eps_hyp", "stability/distance"]
    declared = declared_of(run.quantities.values())
    spec = json.loads(specification(make_workspace("e", "p", declared)))
    text = json.dumps(spec)
    patterns = set(re.findall(r'"metricRegex": "(\^[^"]+)"', text))
    assert len(patterns) > 10
    for pattern in patterns:
        assert any(re.search(pattern, key) for key in keys), pattern
    summary = summary_of(trained / "good")
    for key in re.findall(r'"summary:([^"]+)"', text):
        metric, _, part = key.rpartition(".")
        assert part in summary[(metric,)], key
    assert json.loads(specification(make_report("e", "p", declared)))["spec"]


SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def values_of(parameter):
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


# W&B leaves the file open that it reads
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_starts_commands_that_parse(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep_config(str(path))
    assert sweep["method"] in ("grid", "random")
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "${program}", "fit"]
    choices = {key: values_of(value) for key, value in sweep["parameters"].items()}
    longest = max(len(values) for values in choices.values())
    for place in range(longest):
        drawn = {key: values[place % len(values)] for key, values in choices.items()}
        # as the agent writes them
        args = [f"--{key}={value}" for key, value in drawn.items()]
        words = [[word] if word != "${args}" else args for word in sweep["command"][3:]]
        assert main([*itertools.chain(*words), "--print_config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for key, value in drawn.items():
            found = config
            for part in key.split("."):
                found = found[part]
            found = found["class_path"].rpartition(".")[2] if key == "model" else found
            assert found == value
        loggers = config["trainer"]["logger"]
        assert [one["init_args"].get("offline") for one in loggers] == [None, False]

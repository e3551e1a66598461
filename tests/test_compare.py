"""`lit-resnorm compare` on run directories and logs of other projects."""

import io
import json
import math
import shutil
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
from handmade_runs import document, losses, make_run
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from small import FunctionalNet, loaders, quiet_trainer

from lit_resnorm.cli import main
from lit_resnorm.compare import read_runs
from lit_resnorm.compare.config import flat_config
from lit_resnorm.compare.recorded import Series
from lit_resnorm.compare.table import print_comparison
from lit_resnorm.compare.thinning import kept_places

SITES = ("001.net.a", "002.net.b", "010.net.c")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_seeds_are_averaged_at_exact_steps(tmp_path):
    make_run(tmp_path / "a", losses(4.0, 2.0, 1.0), seed=0)
    make_run(tmp_path / "b", losses(6.0, 3.0), seed=1)
    make_run(tmp_path / "c", losses(1.0), lr=0.2)
    found = document(tmp_path)
    assert [group["runs"] for group in found["groups"]] == [[0, 1], [2]]
    assert [group["label"] for group in found["groups"]] == [
        "LitResNet, lr 0.1",
        "LitResNet, lr 0.2",
    ]
    first, second = found["group_series"]["train/loss"]
    assert first["step"] == [0, 10, 20]
    assert first["mean"] == [5.0, 2.5, 1.0]
    assert first["std"] == [math.sqrt(2), math.sqrt(0.5), None]
    assert first["count"] == [2, 2, 1]
    assert second == {
        "group": 1,
        "step": [0],
        "mean": [1.0],
        "std": [None],
        "count": [1],
    }
    cell = found["table"]["groups"][0]["val/accuracy"]
    assert cell["mean"] == pytest.approx(0.2)
    assert (cell["count"], cell["min"], cell["max"]) == (2, 0.1, 0.3)
    assert found["differences"] == [
        {"key": "lr", "values": [0.1, 0.1, 0.2]},
        {"key": "seed", "values": [0, 1, 0]},
    ]


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_equal_runs_average_to_themselves_exactly(tmp_path, copies):
    values = np.random.default_rng(0).normal(size=50) * 1e3
    for seed in range(copies):
        make_run(tmp_path / str(seed), losses(*values.tolist()), seed=seed)
    found = document(tmp_path)
    (group,) = found["group_series"]["train/loss"]
    assert group["mean"] == values.tolist()
    assert set(group["std"]) == {0.0}
    assert set(group["count"]) == {copies}
    (row,) = found["table"]["groups"]
    assert row["val/accuracy"]["mean"] == values[-1] / 10


def test_what_is_not_finite_is_counted_apart_and_never_averaged(tmp_path):
    make_run(tmp_path / "a", losses(1.0, "NaN", 3.0), seed=0)
    rows = [{"step": 0, "train/loss": 2.0}, {"step": 10, "train/loss": 5.0}]
    rows.append({"step": 20, "train/loss": "-Infinity"})
    make_run(tmp_path / "b", rows, seed=1)
    found = document(tmp_path, by=["variant"])
    (group,) = found["group_series"]["train/loss"]
    assert group["mean"] == [1.5, 5.0, 3.0]
    assert group["count"] == [2, 1, 1]
    assert group["not_finite"] == [0, 1, 1]
    assert found["series"]["train/loss"][0]["value"] == [1.0, "NaN", 3.0]
    assert found["series"]["train/loss"][1]["value"] == [2.0, 5.0, "-Infinity"]


def test_any_config_key_groups_flat_or_nested(tmp_path):
    make_run(tmp_path / "a", losses(1.0), lr=0.1)
    make_run(tmp_path / "b", losses(2.0), lr=0.2, seed=1)
    for key in ("lr", "model.optimizer.lr", "model.init_args.optimizer.init_args.lr"):
        assert document(tmp_path, by=[key])["by"] == ["lr"]
        assert len(document(tmp_path, by=[key])["groups"]) == 2
    (group,) = document(tmp_path, by=["model.activation"])["groups"]
    assert (group["key"], group["runs"]) == ({"model.activation": "relu"}, [0, 1])
    assert group["label"] == "model.activation relu"


def test_runs_that_differ_in_the_network_are_not_averaged_unasked(tmp_path):
    for name, activation in (("a", "relu"), ("b", "tanh")):
        path = make_run(tmp_path / name, losses(1.0)) / "config.yaml"
        path.write_text(path.read_text().replace("relu", activation))
    found = document(tmp_path)
    assert [group["label"] for group in found["groups"]] == [
        "LitResNet, activation relu",
        "LitResNet, activation tanh",
    ]


def test_names_and_paths_of_a_machine_are_no_config(tmp_path):
    make_run(tmp_path / "a", losses(1.0))
    config = document(tmp_path / "a")["runs"][0]["config"]
    assert str(tmp_path) not in json.dumps(config)
    assert not {"run", "data.root", "trainer.default_root_dir"} & config.keys()
    assert config["trainer.callbacks.Probe.cadence"] == 5
    assert (config["lr"], config["seed"]) == (0.1, 0)
    assert "model.optimizer.lr" not in config


def test_lists_and_components_of_one_class_have_their_own_keys():
    probes = [{"class_path": "a.P", "init_args": {"k": i}} for i in range(2)]
    flat = flat_config({"shape": [1, 8], "probes": probes, "net": {"a": {"b": None}}})
    assert flat == {
        "shape": "[1, 8]",
        "probes.P": "a.P",
        "probes.P.k": 0,
        "probes.P.2": "a.P",
        "probes.P.2.k": 1,
        "net.a.b": None,
    }


def test_values_of_sites_are_by_depth_and_never_series(tmp_path):
    rows = [
        {"step": s, f"moments/effective_rank/{site}": s + i}
        for s in (0, 5)
        for i, site in enumerate(SITES)
    ]
    rows += [{"step": 0, "activation/dead/002.net.b": "NaN", "fim/top/01": 1.0}]
    make_run(tmp_path / "a", rows)
    found = document(tmp_path / "a")
    assert list(found["series"]) == ["fim/top/01"]
    assert found["depth"]["moments/effective_rank"] == [
        {
            "run": 0,
            "steps": [0, 5],
            "sites": list(SITES),
            "values": [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]],
        }
    ]
    assert found["depth"]["activation/dead"][0]["values"] == [["NaN"]]
    assert found["table"]["runs"][0]["moments/effective_rank"] == 7.0


def test_the_best_value_stands_for_the_last_where_asked(tmp_path):
    make_run(tmp_path / "a", losses(3.0, 9.0, 1.0))
    last, best = document(tmp_path), document(tmp_path, best=True)
    assert last["table"]["runs"][0]["val/accuracy"] == 0.1
    assert best["table"]["runs"][0]["val/accuracy"] == 0.9


def test_columns_without_a_value_in_any_run_are_left_out(tmp_path):
    make_run(tmp_path / "a", losses(1.0))
    make_run(tmp_path / "b", [{"step": 0, "stability/eps_hyp": 0.25}])
    keys = [column["key"] for column in document(tmp_path)["columns"]]
    assert keys == ["variant", "depth", "lr", "val/accuracy", "stability/eps_hyp"]


def test_findings_name_the_pathology_with_its_numbers_and_paper(tmp_path):
    rows = [
        {"step": 0, "moments/pathology": 2.0, "moments/log_slope": math.log(1.2)},
        {"step": 0, "fim/lambda_max": 100.0, "fim/rate_bound": 0.02},
        {"step": 0, "fim/rate": 0.1, "fim/rate_ratio": 5.0, "train/loss": 2.0},
        {"step": 3, "train/loss": "NaN"},
        {"step": 3, **{f"activation/dead/{site}": 0.75 for site in SITES[:2]}},
        {"step": 3, f"activation/dead/{SITES[2]}": 0.25},
    ]
    make_run(tmp_path / "bad", rows, status="diverged")
    make_run(
        tmp_path / "good",
        [{"step": 0, "moments/pathology": 0.0, "fim/rate_ratio": 0.5}],
        variant="LitResNetBN",
    )
    found = document(tmp_path)["findings"]
    told = {(one["run"], one["severity"], one["text"], one["source"]) for one in found}
    texts = " ".join(text for run, _, text, _ in told if run == 0)
    assert "Noise pathology" in texts
    assert "times 1.2 a layer" in texts
    assert "5 times its bound at step 0: 0.1 against 0.02" in texts
    assert "2 of 3 layers" in texts
    assert "last finite training loss was 2" in texts
    assert {severity for run, severity, *_ in told if run == 1} == {"good"}
    assert any("1811.03087" in source for *_, source in told)
    assert found[0]["severity"] == "bad"


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("train/loss", "Its train/loss is not finite from step 3 on."),
        ("train_loss", "Its train_loss is not finite from step 3 on."),
        ("val_loss", "Its val_loss is not finite from step 3 on."),
        ("loss", "Its loss is not finite from step 3 on."),
        ("loss_epoch", "Its loss_epoch is not finite from step 3 on."),
        ("a/val_loss/dataloader_idx_0", "Its a/val_loss/dataloader_idx_0 is"),
        ("loss_scale", None),
        ("fim/lambda_max", None),
    ],
)
@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_any_loss_that_ends_not_finite_is_found(tmp_path, key, told, status):
    values = (2.0, "Infinity", 3.0, "NaN", "Infinity")
    rows = [{"step": step, key: value} for step, value in enumerate(values)]
    make_run(tmp_path / "a", rows, status=status)
    texts = " ".join(one["text"] for one in document(tmp_path)["findings"])
    assert ("Its " in texts) == (told is not None)
    assert (told or "") in texts


def test_a_loss_that_came_back_is_no_divergence(tmp_path):
    make_run(tmp_path / "a", losses(2.0, "NaN", 1.0))
    found = document(tmp_path)["findings"]
    assert [one["name"] for one in found] == ["learned", "nothing_measured"]


def test_a_run_that_says_it_diverged_is_found_by_its_status(tmp_path):
    rows = [{"step": 0, "val_loss": 5.0, "train_loss": 2.5}]
    rows += [{"step": 4, "train_loss": "NaN"}]
    make_run(tmp_path / "a", rows, status="diverged")
    one, other = document(tmp_path)["findings"]
    assert (one["name"], other["name"]) == ("diverged", "nothing_measured")
    assert one["text"] == ("Diverged by step 4; its last finite training loss was 2.5.")


def test_a_rate_above_its_bound_is_bad_where_a_loss_of_any_name_diverged(tmp_path):
    rows = [{"step": 0, "fim/rate_ratio": 5.0, "train_loss": 2.0}]
    rows += [{"step": 3, "train_loss": "NaN"}]
    make_run(tmp_path / "a", rows)
    found = document(tmp_path)["findings"]
    assert [one["severity"] for one in found] == ["bad", "bad"]
    assert "5 times its bound" in found[1]["text"]


def test_a_network_that_learned_nothing_is_named(tmp_path):
    rows = [{"step": 0, "moments/pathology": 2.0}, {"step": 9, "val/accuracy": 0.15}]
    rows += [{"step": 9, "moments/pathology": 0.0}]
    path = make_run(tmp_path / "a", rows) / "config.yaml"
    path.write_text(path.read_text().replace("width: 8", "num_classes: 10"))
    found = document(tmp_path)["findings"]
    assert {one["severity"] for one in found} == {"bad"}
    assert "validation accuracy 0.15, a guess 0.1" in found[0]["text"]
    path.write_text(path.read_text().replace("num_classes: 10", "num_classes: 30"))
    assert {one["severity"] for one in document(tmp_path)["findings"]} == {"warn"}


def test_a_healthy_run_is_told_what_was_found_in_order(tmp_path):
    rates = {f"activation/rate/{site}": 0.3 + i / 10 for i, site in enumerate(SITES)}
    rows = [{"step": 0, "train/loss": 2.0, "fim/rate_ratio": 0.5}]
    rows += [{"step": 9, "train/loss": 0.5, "val/accuracy": 0.9}]
    rows += [{"step": 9, **rates, **{f"activation/dead/{site}": 0 for site in SITES}}]
    make_run(tmp_path / "a", rows)
    found = document(tmp_path)
    texts = {one["name"]: one["text"] for one in found["findings"]}
    assert {one["severity"] for one in found["findings"]} == {"good"}
    assert texts["learned"] == (
        "Training loss from 2 to 0.5 over 9 steps; validation accuracy 0.9."
    )
    assert texts["units"] == (
        "3 layers, activation rates 0.30 to 0.50, nothing dead at the end."
    )
    assert "at most 0.5 of it" in texts["rate_below_bound"]
    assert [*found["explanations"]] == [one["name"] for one in found["findings"]]


def test_a_training_loss_that_hardly_fell_is_a_warning(tmp_path):
    make_run(tmp_path / "a", losses(2.0, 2.0, 1.99))
    make_run(tmp_path / "b", losses(2.0, 2.0, 1.5))
    names = [(one["run"], one["name"]) for one in document(tmp_path)["findings"]]
    assert (0, "loss_hardly_fell") in names
    assert (1, "learned") in names


def test_an_accuracy_that_never_moved_is_no_learning_whatever_the_loss(tmp_path):
    rows = [
        {"step": step, "train/loss": loss, "val/accuracy": accuracy}
        for step, loss, accuracy in ((0, 1e5, 0.1), (5, 9.0, 0.12), (9, 2.3, 0.11))
    ]
    rows[-1] |= {f"activation/dead/{SITES[0]}": 1.0}
    make_run(tmp_path / "a", rows)
    found = {one["name"]: one for one in document(tmp_path)["findings"]}
    assert found.keys() == {"learned_little", "dead_units"}
    assert "stayed between 0.1 and 0.12" in found["learned_little"]["text"]
    assert found["dead_units"]["severity"] == "bad"


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        ("SGD", None, "rate_below_bound"),
        ("Adam", None, "rate_not_judged"),
        ("Adam", 0.0, "rate_not_judged"),
        ("Own", 1.0, "rate_below_bound"),
    ],
)
def test_only_a_rate_that_a_bound_applies_to_is_judged(
    tmp_path, optimizer, kind, expected
):
    rows = [{"step": 0, "fim/rate_ratio": 0.5, "fim/rate": 0.1}]
    if kind is not None:
        rows[0]["fim/optimizer_kind"] = kind
    path = make_run(tmp_path / "a", rows) / "config.yaml"
    path.write_text(path.read_text().replace("optim.SGD", f"optim.{optimizer}"))
    (found,) = document(tmp_path)["findings"]
    assert found["name"] == expected
    assert found["severity"] == ("good" if expected == "rate_below_bound" else "info")


@pytest.mark.parametrize(
    ("ratio", "name", "words"),
    [
        (1e-6, "rate_too_low", "5e5 steps"),
        (2.0, "rate_above_bound", "1.4 (batch norm) to 16 times"),
        (30.0, "rate_above_bound", "expect divergence"),
        (1e7, "rate_above_bound", "throw the outputs"),
    ],
)
def test_what_a_ratio_means_is_said_beside_it(tmp_path, ratio, name, words):
    make_run(tmp_path / "a", [{"step": 0, "fim/rate_ratio": ratio}])
    (found,) = document(tmp_path)["findings"]
    assert found["name"] == name
    assert words in found["text"]


def test_long_series_keep_their_ends_peaks_and_first_break():
    value = np.sin(np.arange(20_000) / 50)
    value[7_777], value[12_345], value[15_001] = 100.0, -100.0, math.inf
    value[15_000], value[15_002] = math.nan, math.nan
    kept = kept_places(value)
    assert len(kept) <= 500
    assert {0, 7_777, 12_345, 15_000, 15_001, 19_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert kept_places(value[:500]).tolist() == list(range(500))
    assert kept_places(np.full(1000, math.nan))[[0, -1]].tolist() == [0, 999]


def test_a_thinned_series_says_so(tmp_path):
    make_run(tmp_path / "a", losses(*range(1001)))
    (curve,) = document(tmp_path)["series"]["train/loss"]
    assert curve["thinned"]
    assert curve["step"][-1] == 10_000
    assert len(curve["step"]) == len(curve["value"]) <= 500


SUMMARIES = {
    "a list": "[]",
    "a list of pairs": '[["status", "finished"]]',
    "nothing": "null",
    "a status": '{"status": null}',
    "verdicts": '{"status": "finished", "verdicts": 5}',
    "seconds": '{"status": "finished", "seconds": "long"}',
}


def damage(path, name):
    if name == "empty":
        path.mkdir()
    elif name == "no history":
        make_run(path, losses(1.0))
        (path / "history.jsonl").unlink()
    elif name == "no values":
        make_run(path, [])
    elif name == "history":
        make_run(path, losses(1.0, 2.0))
        (path / "history.jsonl").write_text('{"step": 0, "a": 1}\n{"ste\n{}\n')
    elif name == "summary":
        make_run(path, losses(1.0))
        (path / "summary.json").write_text("{")
    elif name in SUMMARIES:
        make_run(path, losses(1.0))
        (path / "summary.json").write_text(SUMMARIES[name])
    elif name == "config":
        make_run(path, losses(1.0))
        (path / "config.yaml").write_text("a: [")
    elif name == "csv":
        path.mkdir()
        (path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    else:
        path.mkdir()
        folder = path / "offline-run-20260101_000000-x"
        folder.mkdir()
        (folder / "run-x.wandb").write_bytes(b"something else")


DAMAGED = {
    "empty": "it is empty",
    "no history": "it has no history.jsonl",
    "no values": "it holds no values",
    "history": "history.jsonl, line 2: no JSON",
    "summary": "summary.json is damaged",
    **dict.fromkeys(SUMMARIES, "summary.json is damaged"),
    "config": "config.yaml is damaged",
    "csv": "has no column 'step'",
    "wandb": "is no W&B run file",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_named_and_the_rest_compared(tmp_path, name):
    make_run(tmp_path / "all" / "good", losses(1.0))
    damage(tmp_path / "all" / name, name)
    found = document(tmp_path / "all")
    assert [run["name"] for run in found["runs"]] == ["good"]
    (one,) = found["skipped"]
    assert DAMAGED[name] in one["reason"]
    assert name in one["name"]


def test_a_half_written_run_is_compared_as_far_as_it_came(tmp_path):
    path = make_run(tmp_path / "a", losses(3.0, 2.0), status=None)
    with (path / "history.jsonl").open("a") as file:
        file.write('{"step": 20, "train/lo')
    found = document(path)
    assert found["runs"][0]["status"] == "interrupted"
    assert found["series"]["train/loss"][0]["step"] == [0, 10]


def test_a_run_that_is_found_twice_counts_once(tmp_path):
    make_run(tmp_path / "all" / "a", losses(1.0))
    make_run(tmp_path / "all" / "b", losses(2.0), seed=1)
    words = ["all", "all/a", "all/../all/b", "all/b/history.jsonl"]
    assert [run["name"] for run in document(*words)["runs"]] == ["a", "b"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    make_run(tmp_path / "one" / "run", losses(1.0))
    make_run(tmp_path / "two" / "run", losses(2.0))
    names = [run["name"] for run in document(tmp_path)["runs"]]
    assert names == ["one/run", "two/run"]


@pytest.fixture(scope="module")
def csv_log(tmp_path_factory):
    """The log of another project: CSVLogger and a network with two seeds."""
    folder = tmp_path_factory.mktemp("csv")
    for seed in (0, 1):
        L.seed_everything(seed, verbose=False)
        logger = CSVLogger(folder, name="logs")
        logger.log_hyperparams({"lr": 0.01, "seed": seed, "net": {"hidden": (16, 16)}})
        trainer = quiet_trainer(max_epochs=2, logger=logger, log_every_n_steps=2)
        trainer.fit(FunctionalNet(), *loaders())
    return folder


def test_csv_logs_of_another_project_are_compared(csv_log, tmp_path):
    found = document(csv_log)
    assert [run["name"] for run in found["runs"]] == [
        "logs/version_0",
        "logs/version_1",
    ]
    assert {run["kind"] for run in found["runs"]} == {"csv"}
    assert [group["runs"] for group in found["groups"]] == [[0, 1]]
    assert found["differences"] == [{"key": "seed", "values": [0, 1]}]
    assert found["same"]["net.hidden"] == "[16, 16]"
    lines = (csv_log / "logs/version_0/metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("loss")
    expected = [float(x) for x in (li.split(",")[place] for li in lines[1:]) if x]
    assert found["series"]["loss"][0]["value"] == expected
    make_run(tmp_path / "ours", losses(1.0))
    mixed = document(csv_log / "logs" / "version_1", tmp_path / "ours")
    assert [run["kind"] for run in mixed["runs"]] == ["csv", "directory"]
    assert len(mixed["groups"]) == 2


def test_csv_cells_that_are_not_finite_differ_from_empty_ones(csv_log, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    text = "a,step,val_acc\n1,0,\nnan,1,0.5\n-inf,2,\n0.123,3,0.25\n0.12"
    (folder / "metrics.csv").write_text(text)
    found = document(folder)
    assert found["series"]["a"][0]["value"] == [1.0, "NaN", "-Infinity", 0.123]
    assert found["series"]["val_acc"][0]["step"] == [1, 3]
    assert found["table"]["runs"][0]["val/accuracy"] == 0.25


def test_hparams_with_tags_of_python_run_nothing(csv_log, tmp_path):
    folder = tmp_path / "version_9"
    shutil.copytree(csv_log / "logs" / "version_0", folder)
    tag = "!!python/object/apply:os.system"
    (folder / "hparams.yaml").write_text(f"act: {tag} ['touch run']\nlr: 1\n")
    config = document(folder)["runs"][0]["config"]
    assert config == {"act": '["touch run"]', "lr": 1}
    assert not (tmp_path / "run").exists()


HOSTILE = ["<script>alert(1)</script>", "a\"b'c", "[bold]x[/bold]", "../../etc"]


def test_hostile_names_and_values_do_no_harm(tmp_path, capsys):
    for place, text in enumerate(HOSTILE):
        name = f"x {text}".replace("/", "_")
        path = make_run(tmp_path / "all" / name, losses(1.0), seed=place)
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("relu", json.dumps(text)))
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", "all", "--out", "", "--json", "c.json"]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "c.json"])
    printed = capsys.readouterr().out
    for text in HOSTILE:
        assert text.replace("/", "_") in printed
        assert (
            text
            in json.loads((tmp_path / "c.json").read_text())["differences"][1]["values"]
        )


def test_the_command_prints_differences_table_and_findings(tmp_path, capsys):
    rows = [{"step": 0, "moments/pathology": 1.0, "val/accuracy": 0.125}]
    make_run(tmp_path / "all" / "a", rows)
    make_run(tmp_path / "all" / "b", losses(1.0), lr=0.5)
    (tmp_path / "all" / "none").mkdir()
    assert main(["compare", "all", "--json", "c.json"]) == 0
    printed = capsys.readouterr().out
    assert "skipped all/none: it is empty" in printed
    assert "0.1, 0.5" in printed
    assert "0.125" in printed
    assert "a: Signal pathology" in printed
    assert "see docs/values.md#signal" in " ".join(printed.split())
    assert "\nsignal pathology: Plain net: skip connections" in printed
    assert json.loads((tmp_path / "c.json").read_text())["format"] == 1
    assert "<html" in (tmp_path / "compare.html").read_text()[:300].lower()


def test_groups_print_mean_and_spread(tmp_path, capsys):
    for seed, value in enumerate((1.0, 3.0)):
        make_run(tmp_path / "all" / str(seed), losses(value), seed=seed)
    assert main(["compare", "all", "--out", ""]) == 0
    printed = capsys.readouterr().out
    assert "0.2 ± 0.14" in printed
    assert not (tmp_path / "compare.html").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_cell_is_cut_in_a_narrow_terminal(tmp_path, width):
    rows = [{"step": 0, "val/accuracy": 0.1234, "val/loss": 1.111, "fim/rate": 1.0}]
    rows += [{"step": 0, "fim/lambda_max": 2.222, "fim/rate_bound": 3.333}]
    rows += [{"step": 0, "moments/power_exponent": 4.444, "moments/pathology": 2.0}]
    rows += [{"step": 5, "generalization_gap": 5.555, "moments/pathology": 0.0}]
    make_run(tmp_path / "a_run_of_some_length", rows)
    console = Console(width=width, file=io.StringIO())
    print_comparison(document(tmp_path), console)
    printed = console.file.getvalue()
    cells = ("LitResNet", "0.1234", "1.111", "2.222", "3.333", "4.444", "5.555")
    for cell in (*cells, "noise → none", "sensitivity", "accuracy", "exponent"):
        assert cell in printed
    assert max(map(len, printed.splitlines())) <= width


def test_of_many_findings_the_worst_are_printed(tmp_path, capsys):
    for seed in range(30):
        rows = [{"step": 0, "fim/rate_ratio": 0.5, "moments/pathology": 0.0}]
        make_run(tmp_path / "all" / f"good{seed}", rows, seed=seed)
    make_run(tmp_path / "all" / "last", losses("NaN"), status="diverged")
    assert main(["compare", "all", "--out", "", "--json", "c.json"]) == 0
    printed = capsys.readouterr().out
    assert "last: Diverged" in printed
    # each kind of trouble has its advice, once
    assert printed.count("\ndiverged: ") == 1
    assert "and 22 more findings" in printed
    assert len(json.loads((tmp_path / "c.json").read_text())["findings"]) == 62


def test_nothing_to_compare_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["compare", "empty"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lit-resnorm: error: nothing to compare")
    assert "empty: it is empty" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


WRONG = {
    "no run": ([], "required: RUN"),
    "a missing path": (["all", "missing"], "missing: no such file"),
    "a missing path among runs": (["all", "all/b"], "all/b: no such file"),
    "an option": (["all", "--bye", "lr"], "--bye"),
    "a key": (["all", "--by", "momentun"], "--by momentun: no run has"),
    "no file": (["all", "--json", "no/such/c.json"], "--json no/such/c.json"),
    "a folder": (["all", "--out", "all"], "--out all: it is a directory"),
    "no project": (["all", "--workspace"], "'all' is no ENTITY/PROJECT"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_status_2(tmp_path, capsys, case):
    make_run(tmp_path / "all" / "a", losses(1.0))
    args, words = WRONG[case]
    assert main(["compare", *args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_help_names_the_command(capsys):
    assert main(["--help"]) == 0
    assert "  compare  " in capsys.readouterr().out
    assert main(["compare", "--help"]) == 0
    assert "--workspace" in capsys.readouterr().out


def test_compare_needs_neither_torch_nor_lightning(tmp_path):
    make_run(tmp_path / "a", losses(1.0))
    code = (
        "import sys; from lit_resnorm.cli import main; status = main();"
        "assert not {'torch', 'lightning', 'pandas'} & set(sys.modules), 'slow';"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "compare", str(tmp_path / "a")]
    subprocess.run(command, check=True, capture_output=True)


def test_of_two_values_at_one_step_the_later_counts(tmp_path):
    rows = [{"step": s, "a": v} for s, v in ((5, 1.0), (0, 2.0), (5, 3.0))]
    make_run(tmp_path / "a", rows)
    (run,), _ = read_runs([str(tmp_path / "a")])
    series = run.series["a"]
    assert isinstance(series, Series)
    assert (series.step.tolist(), series.value.tolist()) == ([0, 5], [2.0, 3.0])

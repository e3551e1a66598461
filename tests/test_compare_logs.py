"""One fit with several loggers, settings of other projects, tables that fit."""

import math
from dataclasses import replace

import pytest
from handmade_runs import document, make_run

from lit_resnorm.compare import comparison_document
from lit_resnorm.compare.config import told_setting
from lit_resnorm.compare.page import write_page
from lit_resnorm.compare.recorded import recorded_of_rows
from lit_resnorm.compare.several_logs import with_logs_joined

ROWS = [
    {"step": 0, "train_loss": 2.0, "val_loss": math.nan},
    {"step": 5, "train_loss": 1.0},
]
CONFIG = {"num_layers": 6, "learning_rate": 1e-3}


def log(kind, rows=ROWS, config=CONFIG, **summary):
    return recorded_of_rows(
        rows,
        name=kind,
        source=f"logs/{kind}",
        kind=kind,
        config=config,
        summary=summary,
    )


def test_one_fit_that_several_loggers_kept_counts_once():
    csv = log("csv", [*ROWS, {"step": 5, "only_here": 3.0}])
    offline = log("offline", config={**CONFIG, "more": 1}, status="finished")
    (joined,) = with_logs_joined([csv, offline])
    assert joined.logs == ("logs/offline", "logs/csv")
    assert (joined.name, joined.status) == ("offline", "finished")
    assert joined.config == {**CONFIG, "more": 1}
    assert {*joined.series} == {"train_loss", "val_loss", "only_here"}
    (run,) = comparison_document([joined])["runs"]
    assert run["logs"] == [*joined.logs]


@pytest.mark.parametrize(
    "other",
    [
        log("offline", config={**CONFIG, "num_layers": 7}),
        log("offline", [{**ROWS[0], "train_loss": 2.5}, ROWS[1]]),
        log("offline", ROWS[:1]),
        log("offline", [{"step": 0, "other": 1.0}]),
        log("csv"),
    ],
    ids=["setting", "value", "length", "nothing shared", "kind"],
)
def test_logs_that_differ_are_runs_of_their_own(other):
    runs = [log("csv"), other]
    assert with_logs_joined(runs) == runs


def test_two_fits_of_equal_values_and_two_logs_each_stay_two():
    runs = [
        replace(log(kind), name=f"{kind}{k}")
        for kind in ("csv", "offline")
        for k in (1, 2)
    ]
    joined = with_logs_joined(runs)
    assert [run.name for run in joined] == ["offline1", "offline2"]


def test_logs_of_one_fit_are_told_in_the_terminal(capsys):
    from rich.console import Console

    from lit_resnorm.compare.table import print_comparison

    joined = with_logs_joined([log("csv"), log("offline")])
    print_comparison(comparison_document(joined), Console(width=100))
    said = capsys.readouterr().out
    assert "offline: one run with 2 logs (logs/offline, logs/csv)" in said


@pytest.mark.parametrize(
    ("config", "key", "told"),
    [
        ({"num_layers": 6}, "depth", 6),
        ({"model.depth": 12, "depth": 3}, "depth", 3),
        ({"encoder.num_layers": 6, "decoder.num_layers": 2}, "depth", None),
        ({"encoder.num_layers": 6, "decoder.num_layers": 6}, "depth", 6),
        ({"num_layers": True}, "depth", None),
        ({"optimizer": "torch.optim.AdamW", "optimizer.lr": 0.1}, "optimizer", "AdamW"),
        ({"optimizer.lr": 0.1}, "lr", 0.1),
        ({"optimizer": "AdamW (\nParameter Group 0"}, "optimizer", None),
        ({"model": "torchvision.models.ResNet"}, "variant", "ResNet"),
        ({"arch": "vit_b_16", "model": "x.Lit"}, "variant", "vit_b_16"),
        ({"learning_rate": "high"}, "lr", None),
        # a run of ours says it all itself
        ({"variant": "LitMLP", "model.num_layers": 6}, "depth", None),
        ({}, "variant", None),
    ],
)
def test_settings_of_other_projects_are_told_where_they_can_be(config, key, told):
    assert told_setting(config, key) == told


def test_runs_of_other_projects_have_columns_of_their_settings():
    config = {"arch": "vit", "num_layers": 6, "optim": "AdamW", "learning_rate": 0.1}
    found = comparison_document([log("csv", config=config)])
    titles = [column["title"] for column in found["columns"]]
    assert titles[:4] == ["variant", "depth", "optimizer", "lr"]
    (cells,) = found["table"]["runs"]
    assert [cells[key] for key in ("variant", "depth", "optimizer", "lr")] == [
        "vit",
        6,
        "AdamW",
        0.1,
    ]


def test_the_status_stands_first_where_a_run_is_in_trouble(tmp_path):
    make_run(tmp_path / "a", ROWS, status="diverged")
    make_run(tmp_path / "b", ROWS)
    columns = document(tmp_path)["columns"]
    assert columns[0]["key"] == "status"


@pytest.mark.browser
def test_results_of_many_columns_fit_the_window_and_the_rest_is_shown_on_demand(
    reader, tmp_path
):
    make_run(tmp_path / "a", ROWS)
    make_run(tmp_path / "b", ROWS)
    found = document(tmp_path)
    for k in range(30):
        key = f"probe/{k}"
        column = {"key": key, "title": f"quantity {k}", "better": None, "digits": 4}
        found["columns"].append(column)
        for cells in found["table"]["runs"]:
            cells[key] = 1.2345e-5
    write_page(found, tmp_path / "page.html")
    reader.look(1400, 1000)
    reader.open(tmp_path / "page.html")
    box = "document.querySelector('#results .scroll')"
    fits = f"return {box}.scrollWidth <= {box}.clientWidth"
    number = (
        "return document.querySelectorAll('.results thead th:not([hidden])').length"
    )
    assert reader.run(fits)
    few = reader.run(number)
    assert 5 < few < 31
    button = reader.find("#results .add")
    assert button.text == f"Show {len(found['columns']) + 1 - few} more columns"
    button.click()
    assert reader.run(number) == len(found["columns"]) + 1
    assert not reader.run(fits)
    reader.find("#results .add").click()
    assert reader.run(number) == few

import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from lit_resnorm.cli import main
from lit_resnorm.cli.reproduce import reproduce
from lit_resnorm.errors import UsageError
from lit_resnorm.modules import LitMLP
from lit_resnorm.papers.catalogue import all_items
from lit_resnorm.papers.item import (
    Item,
    all_of,
    between,
    cell_seed,
    grid,
    near,
    not_shown,
    ordered,
    outcome,
)
from lit_resnorm.papers.pages import page, write_pages
from lit_resnorm.papers.results import Results, canonical, results_key
from lit_resnorm.papers.running import Interrupted, executor, reproduce_item
from lit_resnorm.papers.training import fit_full_batch

VERDICT_KEYS = {
    "item",
    "title",
    "source",
    "mark",
    "scale",
    "passed",
    "checks",
    "settings",
    "seeds",
    "versions",
    "commit",
    "seconds",
}


def square(settings, cell, seed):
    """Return a square; append the cell to a log, and stop where the settings say."""
    log = Path(settings["log"])
    log.write_text(log.read_text() + f"{cell['x']}\n")
    if (log.parent / f"stop{cell['x']}").exists():
        raise KeyboardInterrupt
    return [{"y": cell["x"] ** 2 + seed}]


def losing_square(settings, cell, seed):
    """Return a square, and a loss that is infinite but for the first."""
    loss = math.inf if cell["x"] else 1.0
    return [{**row, "loss": loss} for row in square(settings, cell, seed)]


def example(folder, num=4, expected=9.0):
    log = folder / "log"
    if not log.exists():
        log.write_text("")
    settings = {"log": str(log), "num": num}
    return Item(
        name="test2020.fig1",
        title="Squares",
        source="a test",
        mark="D",
        claim="Squares are squares.",
        differs="Nothing.",
        scales={"small": settings, "full": {**settings, "num": 2 * num}},
        cells=lambda settings: grid(x=range(settings["num"])),
        run=square,
        checks=lambda curves, settings: [
            near("largest", curves.y.max(), expected, 0.5, "D")
        ],
        figure=draw,
    )


def draw(curves, settings):
    figure = Figure()
    figure.subplots().plot(curves.x, curves.y)
    return figure


def run_here(item, out, scale="small", seed=0):
    with executor(jobs=1):
        return reproduce_item(item, scale, out, seed)


def ran(folder):
    return (folder / "log").read_text().split()


def test_an_item_leaves_verdict_curves_and_figures(tmp_path):
    verdict = run_here(example(tmp_path), tmp_path / "out")
    folder = tmp_path / "out" / "test2020.fig1"
    assert verdict["passed"]
    written = json.loads((folder / "verdict.json").read_text())
    assert set(written) == VERDICT_KEYS
    assert set(written["checks"][0]) == {
        "name",
        "expected",
        "measured",
        "tolerance",
        "passed",
        "mark",
    }
    curves = pd.read_csv(folder / "curves.csv")
    assert curves.to_dict("list") == {"x": [0, 1, 2, 3], "y": [0, 1, 4, 9]}
    assert (folder / "figure.png").stat().st_size > 0
    assert "<svg" in (folder / "figure.svg").read_text()


def test_a_wrong_expectation_fails_the_verdict(tmp_path):
    assert not run_here(example(tmp_path, expected=8.0), tmp_path / "out")["passed"]


def test_an_interrupted_item_goes_on_where_it_stopped(tmp_path):
    item = example(tmp_path)
    (tmp_path / "stop2").touch()
    with pytest.raises(Interrupted, match="2 of 4 cells"):
        run_here(item, tmp_path / "out")
    (tmp_path / "stop2").unlink()
    assert run_here(item, tmp_path / "out")["passed"]
    assert ran(tmp_path) == ["0", "1", "2", "2", "3"]


def test_a_finished_item_runs_no_cell_again(tmp_path):
    first = run_here(example(tmp_path), tmp_path / "out")
    second = run_here(example(tmp_path), tmp_path / "out")
    assert ran(tmp_path) == ["0", "1", "2", "3"]
    assert first == second


def test_results_of_other_settings_are_kept_and_new_ones_go_beside(tmp_path):
    item, out = example(tmp_path), tmp_path / "out"
    run_here(item, out)
    kept = (out / item.name / "verdict.json").read_bytes()
    other = run_here(item, out, seed=5)
    assert (out / item.name / "verdict.json").read_bytes() == kept
    assert other["folder"] != str(out / item.name)
    assert not other["passed"]


def test_a_folder_that_is_no_result_is_left_alone(tmp_path):
    item, out = example(tmp_path), tmp_path / "out"
    (out / item.name).mkdir(parents=True)
    (out / item.name / "mine.txt").write_text("mine")
    results = Results(out, item, results_key(item, item.scales["small"], 0))
    assert results.beside
    assert [path.name for path in (out / item.name).iterdir()] == ["mine.txt"]


def test_the_key_changes_with_settings_and_seed(tmp_path):
    item = example(tmp_path)
    keys = {
        results_key(item, item.scales[scale], seed)
        for scale in ("small", "full")
        for seed in (0, 1)
    }
    assert len(keys) == 4


@pytest.mark.slow
def test_processes_give_the_numbers_of_this_one(tmp_path):
    item = all_items()["furusho2020.fig1"]
    frames = []
    for name, jobs in (("here", 1), ("processes", 2)):
        with executor(jobs=jobs):
            verdict = reproduce_item(item, "small", tmp_path / name)
        frames.append((Path(verdict["folder"]) / "curves.csv").read_text())
    assert frames[0] == frames[1]


def test_every_item_is_whole():
    items = all_items()
    assert len(items) == 32
    for name, item in items.items():
        assert item.name == name
        assert all((item.title, item.source, item.claim, item.differs))
        for settings in item.scales.values():
            cells = item.cells(settings)
            assert len({canonical(dict(cell)) for cell in cells}) == len(cells) > 0
            assert json.loads(canonical(dict(settings))) == settings
            assert len(results_key(item, settings, 0)) == 16


def test_checks_hold_within_their_tolerance_and_not_beyond():
    assert near("x", 1.1, 1.0, 0.2, "D").passed
    assert not near("x", 1.3, 1.0, 0.2, "D").passed
    assert near("x", 110, 100, 0.1, "D", relative=True).passed
    assert not near("x", math.nan, 1.0, 0.2, "D").passed
    assert between("x", 1, 1, 2, "D").passed
    assert not between("x", 3, None, 2, "D").passed
    assert not between("x", math.nan, 1, None, "D").passed
    assert ordered("x", {"a": 1, "b": 2}, "D").passed
    assert not ordered("x", {"a": 1, "b": 1}, "D").passed
    assert not all_of("x", "all", 0, 0, "D").passed
    assert not all_of("x", "all", 2, 3, "D").passed


def test_an_effect_that_does_not_show_counts_neither_way():
    right, wrong = (near("x", value, 1.0, 0.5, "D") for value in (1.0, 3.0))
    assert outcome([right, not_shown(wrong)]) is True
    assert outcome([wrong, not_shown(right)]) is False
    assert outcome([not_shown(wrong), not_shown(right)]) is None
    assert outcome([]) is False
    assert not_shown(wrong).measured == wrong.measured


def test_a_verdict_that_does_not_show_is_said_in_words(tmp_path, monkeypatch, capsys):
    item = example(tmp_path)
    undecided = replace(
        item,
        checks=lambda curves, settings: [
            not_shown(check) for check in item.checks(curves, settings)
        ],
    )
    monkeypatch.setattr(
        "lit_resnorm.papers.catalogue.load_item", lambda name: undecided
    )
    out = tmp_path / "out"
    asked = ["furusho2020.fig1", "furusho2020.fig2", "--jobs", "1", "--out", str(out)]
    assert reproduce(asked) == 0
    printed = capsys.readouterr().out
    words = "not shown at this scale"
    # a check and a title of each run, and a line each in the summary
    assert printed.count(words) == 6
    assert "0/0" in printed
    text = (out / "test2020.fig1" / "verdict.json").read_text()
    verdict = json.loads(text)
    assert verdict["passed"] is verdict["checks"][0]["passed"] is None
    described = page("furusho2020", [(item, verdict)])
    assert described.count(words) == 3
    assert "0 of 0 items come out" in described
    assert "Why it fails" not in described


def test_seeds_of_cells_depend_on_every_part_of_the_key():
    seeds = {cell_seed(s, k, d) for s in (0, 1) for k in ("a", "b") for d in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_pages_show_claims_verdicts_and_commands(tmp_path):
    item = all_items()["furusho2020.fig1"]
    with executor(jobs=1):
        reproduce_item(item, "small", tmp_path / "out")
    (path,) = write_pages(tmp_path / "out", tmp_path / "docs")
    text = path.read_text()
    assert item.claim in text
    assert "lit-resnorm reproduce furusho2020.fig1 --scale small" in text
    assert "1 of 1 items come out" in text
    assert (tmp_path / "docs" / "figures" / "furusho2020.fig1.png").is_file()


def test_pages_say_why_a_verdict_fails_and_what_was_chosen_late(tmp_path):
    words = {"failing": "Three squared is nine.", "chosen": "The number of squares."}
    item = replace(example(tmp_path, expected=8.0), **words)
    verdict = run_here(item, tmp_path / "out")
    text = page("furusho2020", [(item, verdict)])
    assert all(word in text for word in words.values())
    right = page("furusho2020", [(item, {**verdict, "passed": True})])
    assert words["failing"] not in right
    unknown = page("furusho2020", [(replace(item, failing=""), verdict)])
    assert "*Why it fails.* Not known." in unknown


def test_pages_need_results(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        write_pages(tmp_path, tmp_path / "docs")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["furusho2020.fig77"], "did you mean furusho2020.fig7"),
        ([], "--list"),
        (["furusho2020.fig1", "--scale", "huge"], "small"),
        (["furusho2020.fig1", "--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_use_names_what_is_wrong(args, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        reproduce([*args, "--out", str(tmp_path)])


def test_an_output_that_is_a_file_is_wrong_use(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out"):
        reproduce(["furusho2020.fig1", "--out", str(tmp_path / "file")])


def test_full_names_the_data_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RESNORM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"needs MNIST.*LIT_RESNORM_DATA"):
        reproduce(["furusho2020.fig4", "--scale", "full", "--out", str(tmp_path)])


def test_the_command_lists_items_and_offers_the_nearest_name(capsys):
    assert main(["reproduce", "--list"]) == 0
    assert "labatie2019.fig5" in capsys.readouterr().out
    assert main(["reproduce", "labatie.fig5"]) == 2
    error = capsys.readouterr().err
    assert "labatie2019.fig5" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_terminal_shows_the_whole_name_of_every_item(columns, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    assert reproduce(["--list"]) == 0
    words = capsys.readouterr().out.split()
    assert set(all_items()) <= set(words)


def test_what_is_piped_has_one_line_an_item(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert reproduce(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for item in all_items().values():
        (line,) = (line for line in lines if f" {item.name} " in line)
        assert item.title in line
        assert item.source in line


def test_verdicts_that_are_piped_cut_no_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "test2020.a_name_that_is_longer_than_others"
    item = replace(example(tmp_path), name=name)
    with executor(None, 1):
        reproduce_item(item, "small", tmp_path, console=Console(file=io.StringIO()))
    assert f"{name}: Squares: passed" in capsys.readouterr().out


def test_a_scheduler_needs_dask_or_an_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_resnorm.papers.running.TIMEOUT_S", 1)
    args = ["furusho2020.fig1", "--out", str(tmp_path)]
    assert main(["reproduce", *args, "--scheduler", "tcp://127.0.0.1:9"]) == 1


def test_what_is_no_terminal_gets_lines_of_progress(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_resnorm.papers.running.SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO())
    with executor(None, 1):
        reproduce_item(example(tmp_path), "small", tmp_path, console=console)
    lines = console.file.getvalue().splitlines()
    assert lines == [f"test2020.fig1: {done} of 4 cells" for done in range(5)]


def test_trainings_that_diverge_are_counted_and_not_warned_of_one_by_one(tmp_path):
    torch.manual_seed(0)
    module = LitMLP(
        depth=1,
        width=4,
        in_shape=(3,),
        num_classes=2,
        activation="linear",  # units can't die before the loss is infinite
        loss="mse",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e30),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_full_batch(module, torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), 20)
    assert module.diverged
    assert not [one for one in caught if "finite" in str(one.message)]
    console = Console(file=io.StringIO())
    with executor(None, 1):
        losing = replace(example(tmp_path), run=losing_square)
        reproduce_item(losing, "small", tmp_path, console=console)
    assert "test2020.fig1: 3 of 4 trainings diverged" in console.file.getvalue()

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from handmade_runs import document, losses, make_run
from hostile_runs import (
    chunks,
    line,
    make_corpus,
    odd_settings,
    record,
    row,
    run,
    wandb,
)

from lit_resnorm.cli import main
from lit_resnorm.compare import read_runs
from lit_resnorm.compare.recorded import MOST_VALUES
from lit_resnorm.runs.reading import MOST_BYTES, pieces, read_yaml


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# the peak of getrusage would be that of this process before the other one began
_MEASURED = """
from pathlib import Path
from lit_resnorm.cli import main
status = main(["compare", "all", "--json", "found.json"])
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(status, int(peak) // 1024)
"""


def test_a_good_run_among_hostile_ones_is_compared_and_each_of_them_named(tmp_path):
    names = make_corpus(tmp_path / "all")
    assert len(set(names)) == len(names) >= 200
    make_run(tmp_path / "all" / "good", losses(3.0, 2.0))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True
    )
    status, megabytes = done.stdout.split()[-2:]
    assert status == "0"
    assert int(megabytes) < 500
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["name"] for one in found["runs"]] == ["good"]
    told = {Path(one["name"]).relative_to("all").parts[0] for one in found["skipped"]}
    assert told == set(names)
    assert all(one["reason"] for one in found["skipped"])
    assert not [one for one in found["skipped"] if "it can't be read" in one["reason"]]
    assert not (tmp_path / "ran").exists()
    # the page and the JSON alone were written
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"all", "compare.html", "found.json"}


def test_hostile_words_are_named_too(tmp_path):
    make_run(tmp_path / "good", losses(3.0, 2.0))
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("zero").symlink_to("/dev/zero")
    Path("text.txt").write_text("x")
    words = ["fifo", "loop", "dangling", "zero", "text.txt", "x" * 5000, "a\0b", ""]
    runs, skipped = read_runs(["good", *words])
    assert [one.name for one in runs] == ["good"]
    assert [one["name"] for one in skipped] == words


@pytest.mark.parametrize("name", odd_settings())
def test_odd_settings_are_read_and_compared(tmp_path, name, capsys):
    make_run(tmp_path / "all" / "good", losses(3.0, 2.0))
    run(tmp_path / "all" / "odd", config=odd_settings()[name])
    (tmp_path / "all" / "log").mkdir()
    (tmp_path / "all" / "log" / "metrics.csv").write_text("step,loss\n0,1\n")
    (tmp_path / "all" / "log" / "hparams.yaml").write_text(odd_settings()[name])
    assert main(["compare", "all", "--json", "found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["kind"] for one in found["runs"]] == ["directory", "csv", "directory"]
    assert not (tmp_path / "ran").exists()


def test_settings_in_base_60_stay_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("time: 1:30\nnumber: 12_000\nflag: yes\nrate: 1.0e-3\n")
    expected = {"time": "1:30", "number": 12_000, "flag": True, "rate": 1e-3}
    assert read_yaml(path) == expected


def test_aliases_of_a_config_are_put_in(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: &y [2]}\nb: {<<: *a, x: 3}\nc: *y\n")
    expected = {"a": {"x": 1, "y": [2]}, "b": {"x": 3, "y": [2]}, "c": [2]}
    assert read_yaml(path) == expected


def test_the_largest_numbers_are_averaged_and_printed(tmp_path, capsys):
    large = sys.float_info.max
    for seed in range(3):
        rows = losses(*[large, -large, large][seed:], 5e-324, large)
        make_run(tmp_path / "all" / f"run {seed}", rows, seed=seed)
    found = document("all")
    assert [group["runs"] for group in found["groups"]] == [[0, 1, 2]]
    assert main(["compare", "all", "--out", ""]) == 0


def test_steps_at_the_ends_of_64_bits_keep_their_order(tmp_path):
    ends = [-(2**63), 2**63 - 1]
    rows = "".join(line(a=one) for one in range(2))
    for place, end in enumerate(ends):
        rows = rows.replace('"step": 0', f'"step": {end}', 1)
        assert place < 2
    run(tmp_path / "a", history=rows)
    assert document("a")["series"]["a"][0]["step"] == ends


def test_a_file_of_another_runs_name_does_not_join_that_run(tmp_path):
    wandb(tmp_path / "all", [row(("a", "1"))])
    (folder,) = (tmp_path / "all").iterdir()
    other = folder.with_name("offline-run-20260101_000001-other")
    other.mkdir()
    unsound = chunks([row(("a", "{"))])
    (other / next(folder.iterdir()).name).write_bytes(unsound)
    runs, skipped = read_runs(["all"])
    assert [one.source for one in runs] == [f"all/{folder.name}"]
    assert [one["name"] for one in skipped] == [f"all/{other.name}"]


def test_records_of_many_blocks_are_read(tmp_path):
    names = [f"a long name of a value {place}" for place in range(3000)]
    items = [(name, str(place)) for place, name in enumerate(names)]
    wandb(tmp_path / "one", [row(*items), record("config", ("lr", "0.1")), row(step=1)])
    found = document("one")
    assert [found["series"][name][0]["value"] for name in names] == [
        [float(place)] for place in range(3000)
    ]
    assert found["runs"][0]["config"] == {"lr": 0.1}
    assert found["series"]["loss"][0]["step"] == [0, 1]


def test_a_file_that_grows_as_it_is_read_ends_at_the_bound(tmp_path):
    path = tmp_path / "grows"
    path.write_bytes(b"x" * 100)

    def read_what_grows():
        for piece in pieces(path, 1 << 20):
            with path.open("ab") as file:
                file.write(b"x" * (1 << 20))
            assert piece

    with pytest.raises(ValueError, match="grows holds 1048676 bytes"):
        read_what_grows()


@pytest.mark.slow
def test_a_run_of_more_values_than_are_compared_is_left_out_in_bounded_memory(
    tmp_path,
):
    path = make_run(tmp_path / "all" / "long", losses(1.0))
    text = line(**{f"a{place}": place for place in range(1000)})
    with (path / "history.jsonl").open("a") as file:
        for _ in range(MOST_VALUES // 1000 + 1):
            file.write(text)
    assert (path / "history.jsonl").stat().st_size < MOST_BYTES
    make_run(tmp_path / "all" / "good", losses(3.0, 2.0))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True
    )
    status, megabytes = done.stdout.split()[-2:]
    assert status == "0"
    assert int(megabytes) < 500
    (one,) = json.loads((tmp_path / "found.json").read_text())["skipped"]
    assert "more than 10000000 values" in one["reason"]

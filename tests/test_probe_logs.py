"""What goes to the loggers: scalars, a summary by depth, or all."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from browsing import DEPTH
from handmade_runs import make_run
from lightning.pytorch.loggers import CSVLogger
from small import FunctionalNet, loaders, quiet_trainer

from lit_resnorm.compare import comparison_document, read_runs
from lit_resnorm.compare.online import recorded_online
from lit_resnorm.compare.page import write_page
from lit_resnorm.quantities import PLACES, SITE_KEY, Quantity, along_depth
from lit_resnorm.runs import RunHistory
from lit_resnorm.runs.files import read_run
from lit_resnorm_callbacks import ActivationRateMonitor, Probe

NAN = math.nan


def fit(logger, **options):
    L.seed_everything(7, verbose=False)
    probe = ActivationRateMonitor(cadence=4, **options)
    trainer = quiet_trainer(max_steps=8, callbacks=[probe], logger=logger)
    trainer.fit(FunctionalNet(), *loaders())
    return trainer


@pytest.fixture(scope="module", params=["scalars", "summary", "all"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return SimpleNamespace(
        log=request.param,
        folder=folder,
        trainer=fit(RunHistory(folder), log=request.param),
        history=read_run(folder).history,
    )


def test_a_probe_logs_as_many_scalars_tables_and_figures_as_it_is_told_to(run):
    keys = {k for k in run.history if k.startswith("activation/")}
    keys -= {"activation/rate_mean", "activation/seconds"}
    quantities = ("rate", "dead", "always_on")
    summary = {f"activation/{q}/{place}" for q in quantities for place in PLACES}
    by_site = {
        f"activation/{q}/{site}"
        for q in quantities
        for site in ("002.relu", "004.relu")
    }
    assert keys == {"scalars": set(), "summary": summary, "all": by_site}[run.log]
    assert by_site <= run.trainer.callback_metrics.keys()
    files = {path.stem for path in run.folder.rglob("*") if path.suffix == ".png"}
    assert files == (set() if run.log == "scalars" else {*quantities})
    assert (run.folder / "tables").exists() == (run.log != "scalars")


def test_every_value_by_site_is_compared_unless_only_scalars_are_logged(run):
    (read,), _ = read_runs([str(run.folder)])
    if run.log == "scalars":
        assert not read.depth
        return
    for quantity, sites in read.depth.items():
        for site, series in sites.items():
            assert series.step.tolist() == [0, 4, 8]
            last = run.trainer.callback_metrics[f"{quantity}/{site}"]
            assert series.value[-1] == pytest.approx(float(last), rel=1e-6)
    assert {*read.depth} == {f"activation/{q}" for q in ("rate", "dead", "always_on")}
    assert read.kinds == {"002.relu": "activation", "004.relu": "activation"}
    document = comparison_document([read])
    assert document["depth"]["activation/rate"][0]["sites"] == ["002.relu", "004.relu"]


def test_a_summary_holds_the_values_at_its_places_and_the_table_names_the_worst(run):
    if run.log != "summary":
        return
    lines = (run.folder / "tables/activation/by_depth.jsonl").read_text().splitlines()
    history = run.history.set_index("step")
    for table in map(json.loads, lines):
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        for quantity, bad in {"rate": lambda v: abs(v - 0.5), "dead": float}.items():
            values = [row[quantity] for row in rows]
            logged = {
                place: history[f"activation/{quantity}/{place}"].dropna()[table["step"]]
                for place in PLACES
            }
            assert [logged["first"], logged["last"]] == values
            assert logged["worst"] == max(values, key=bad)
            named = [
                row[quantity] for row in rows if quantity in row["worst"].split(", ")
            ]
            assert named == [logged["worst"]]


class ManyKinds(Probe):
    """A value at every site."""

    quantities = (Quantity("a/<site>", "a"), Quantity("b/<site>", "b", detail=True))

    def __init__(self, **options):
        super().__init__("many", **options)

    def prepare(self, module, sites):
        self.sites_found = sites

    def measure(self, module, batch, reduce):
        names = [site.name for site in self.sites_found]
        return {f"{q}/{name}": torch.ones(()) for q in "ab" for name in names}


def test_a_figure_by_depth_shows_one_kind_of_site_and_others_on_request():
    drawn = {}
    for log in ("summary", "all"):
        probe = ManyKinds(log=log)
        quiet_trainer(max_steps=1, callbacks=[probe]).fit(FunctionalNet(), *loaders())
        drawn[log] = probe.figures()
    assert [*drawn["summary"]] == ["many/a"]
    assert {*drawn["all"]} == {"many/a", "many/a/module", "many/b", "many/b/module"}
    (axes,) = drawn["all"]["many/a"].axes
    assert axes.get_xlabel().startswith("activation")
    assert axes.lines[0].get_xdata().tolist() == [1, 2]


def test_the_figures_name_the_model_and_the_run(tmp_path):
    kept = {}

    class Keeps(RunHistory):
        def log_image(self, key, images, step=None):
            kept.setdefault(key, images)

        def log_table(self, *args, **kwargs):
            pass

    titles = []
    probe = ManyKinds()
    figures = probe.figures

    def watched():
        found = figures()
        titles.extend(found.values())
        return found

    probe.figures = watched
    folder = tmp_path / "some/run"
    trainer = quiet_trainer(max_steps=1, callbacks=[probe], logger=Keeps(folder))
    trainer.fit(FunctionalNet(), *loaders())
    assert {one.axes[0].get_title() for one in titles} == {
        "a (many/a)\nFunctionalNet, some/run"
    }
    assert [*kept] == ["many/a"]


def test_why_a_training_ends_is_said_once(caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        probes = [ActivationRateMonitor(cadence=1, name=name) for name in "ab"]
        quiet_trainer(max_steps=3, callbacks=probes).fit(FunctionalNet(), *loaders())
    said = [r for r in caplog.records if "stopped" in r.message]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("better", "scale", "values", "worst"),
    [
        ("high", "auto", [3.0, 1.0, 2.0], 1),
        ("low", "log", [1.0, math.inf, 2.0], 1),
        (0.5, "linear", [0.4, 0.1, 0.8], 1),
        (1.0, "log", [3.0, 0.2, 4.0], 1),
        (1.0, "log", [3.0, 0.0, 4.0], 1),
        ("low", "auto", [NAN, 1.0, 0.0], 1),
        ("low", "auto", [NAN, NAN, NAN], 0),
        ("high", "auto", [2.0, 1.0, 1.0], 1),
        (None, "auto", [2.0, 1.0, 1.0], None),
    ],
)
def test_the_worst_site_is_what_the_quantity_declares(better, scale, values, worst):
    quantity = Quantity("a/<site>", "a", better=better, scale=scale)
    found = quantity.worst({str(place): value for place, value in enumerate(values)})
    assert found == (None if worst is None else str(worst))


@pytest.mark.parametrize("better", ["more", True, NAN, math.inf, [1]])
def test_what_is_better_is_a_direction_or_a_number(better):
    with pytest.raises(ValueError, match="better of quantity 'a'"):
        Quantity("a", "a", better=better)


def test_a_quantity_is_not_named_as_a_column_of_the_table_by_depth():
    with pytest.raises(ValueError, match="'kind'"):
        Quantity("kind/<site>", "a")


def test_along_the_depth_stand_additions_else_activations_else_all_sites():
    kinds = {"000.a": "activation", "001.b": "norm", "002.c": "activation"}
    assert along_depth(["002.c", "001.b", "000.a"], kinds) == ["000.a", "002.c"]
    assert along_depth(["000.a", "001.b"], kinds) == ["000.a", "001.b"]
    names = ["001.x", "002.net.add", "003.x", "004.net.add"]
    assert along_depth(names, {}) == names[1::2]
    assert along_depth(names, dict.fromkeys(names, "module")) == names


class Growing(Probe):
    """Measures one quantity more each time."""

    quantities = (Quantity("a/<site>", "a"), Quantity("b/<site>", "b"))

    def __init__(self):
        super().__init__("growing", cadence=1)
        self.times = 0

    def measure(self, module, batch, reduce):
        self.times += 1
        keys = ("a", "b")[: self.times]
        return {f"{key}/001.x": torch.tensor(float(self.times)) for key in keys}


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
def test_a_csv_logger_has_tables_by_depth_beside_few_columns(tmp_path):
    for _ in range(2):  # a second run in the same folder replaces the first
        logger = CSVLogger(tmp_path, name="csv", version="run")
        trainer = quiet_trainer(max_steps=2, callbacks=[Growing()], logger=logger)
        trainer.fit(FunctionalNet(), *loaders())
    with (tmp_path / "csv/run/tables/growing/by_depth.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert rows == [
        {"step": "0", "site": "001.x", "kind": "", "a": "1.0", "b": "", "worst": ""},
        *(
            {"step": s, "site": "001.x", "kind": "", "a": v, "b": v, "worst": ""}
            for s, v in (("1", "2.0"), ("2", "3.0"))
        ),
    ]
    (read,), _ = read_runs([str(tmp_path / "csv/run")])
    assert read.depth["growing/b"]["001.x"].value.tolist() == [2.0, 3.0]
    assert not [key for key in read.series if SITE_KEY.fullmatch(key)]


def table(*data, columns=("site", "kind", "rate", "worst")):
    return {"step": 0, "columns": [*columns], "data": [*data]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (table(["001.x", "", 1.0]), "none by site"),
        (table([1, "", 1.0, ""]), "none by site"),
        ({"step": 0}, "none by site"),
        (table(columns=("a", "b")), "none by site"),
        ([], "no object"),
    ],
)
def test_a_damaged_table_is_told_with_its_place(tmp_path, content, reason):
    path = make_run(tmp_path / "a", [{"step": 0, "loss": 1.0}])
    (path / "tables/activation").mkdir(parents=True)
    file = path / "tables/activation/by_depth.jsonl"
    file.write_text(json.dumps(content) + "\n")
    runs, (skipped,) = read_runs([str(path)])
    assert not runs
    assert reason in skipped["reason"]
    assert "by_depth.jsonl" in skipped["reason"]


def test_what_is_no_number_or_no_site_in_a_table_is_left_out(tmp_path):
    path = make_run(tmp_path / "a", [{"step": 0, "loss": 1.0}])
    (path / "tables/activation").mkdir(parents=True)
    rows = [["001.x", "norm", "NaN", ""], ["loss", "", 2.0, ""], ["002.y", 5, "z", ""]]
    file = path / "tables/activation/by_depth.jsonl"
    file.write_text(json.dumps(table(*rows)) + "\n")
    (read,), _ = read_runs([str(path)])
    assert {key: [*sites] for key, sites in read.depth.items()} == {
        "activation/rate": ["001.x"]
    }
    assert [*read.series] == ["loss"]
    assert read.kinds == {"001.x": "norm"}


KINDS = {
    "001.norm": "norm",
    "002.relu": "activation",
    "003.add": "addition",
    "004.relu": "activation",
    "005.add": "addition",
}


def run_of_kinds(path):
    """A run whose sites are of several kinds; a site's value is its place."""
    path = make_run(path, [{"step": 0, "loss": 1.0}])
    (path / "tables/moments").mkdir(parents=True)
    rows = [[site, kind, int(site[:3]), ""] for site, kind in KINDS.items()]
    content = table(*rows, columns=("site", "kind", "mu2", "worst"))
    (path / "tables/moments/by_depth.jsonl").write_text(json.dumps(content) + "\n")
    return path


def test_a_comparison_draws_one_kind_of_site_along_the_depth(tmp_path):
    (read,), _ = read_runs([str(run_of_kinds(tmp_path / "a"))])
    (record,) = comparison_document([read])["depth"]["moments/mu2"]
    assert [record["sites"][place] for place in record["axis"]] == [
        "003.add",
        "005.add",
    ]
    assert record["across"] == "residual addition"
    assert record["values"] == [[1, 2, 3, 4, 5]]


@pytest.mark.browser
def test_the_page_draws_one_kind_of_site_and_all_where_asked(reader, tmp_path):
    (read,), _ = read_runs([str(run_of_kinds(tmp_path / "a"))])
    write_page(comparison_document([read]), tmp_path / "page.html")
    reader.look()
    reader.open(tmp_path / "page.html")
    across = f"{DEPTH} .x-title"
    assert reader.texts(across) == ["residual addition, in the order of execution"]
    reader.find(f"{DEPTH} [aria-expanded]").click()
    sites = f"{DEPTH} tbody .site"
    assert reader.texts(sites) == ["003.add", "005.add"]
    reader.find("#depth .check input", 2).click()
    assert reader.texts(across) == ["site, in the order of execution"]
    assert reader.texts(sites) == [*KINDS]
    assert "sites=all" in reader.choices


def test_tables_on_the_server_are_fetched_for_as_many_steps_as_are_shown():
    fetched = []

    def file(path):
        def download(root, replace):
            step = int(path.removesuffix(".json"))
            fetched.append(step)
            content = table(["001.x", "norm", step / 2, "rate"])
            (Path(root) / path).write_text(json.dumps(content))

        return SimpleNamespace(download=download)

    rows = [
        {
            "_step": step,
            "loss": 1.0,
            "activation/by_depth": {"_type": "table-file", "path": f"{step}.json"},
            "other/by_depth": {"_type": "table-file", "path": "../x.json"},
        }
        for step in range(100)
    ]
    found = recorded_online(
        SimpleNamespace(
            id="x",
            name="x",
            state="finished",
            config={},
            summary={},
            scan_history=lambda: rows,
            file=file,
        ),
        "e/p/x",
    )
    assert len(fetched) == 24
    (sites,) = found.depth.values()
    assert sites["001.x"].step.tolist() == fetched
    assert sites["001.x"].value.tolist() == [step / 2 for step in fetched]

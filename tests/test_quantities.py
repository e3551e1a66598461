"""What probes say of their values, and what comes of it, without knowing any probe."""

import inspect
import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from browsing import TRAINING
from handmade_runs import document, make_run
from lightning.pytorch.loggers import CSVLogger
from offline import complete, records
from shipped_quantities import PATH, PROBES, rows
from small import FunctionalNet, loaders, quiet_trainer

from lit_resnorm.cli import main
from lit_resnorm.compare import comparison_document, read_runs
from lit_resnorm.compare.columns import declared_of
from lit_resnorm.compare.page import write_page
from lit_resnorm.compare.workspace import make_workspace, specification
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.quantities import (
    Code,
    Declared,
    Quantity,
    declared_quantities,
    find_declared,
)
from lit_resnorm.runs import RunHistory, WandbHistory
from lit_resnorm.runs.files import read_run
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
    Probe,
    StabilityProbe,
)

ROOT = Path(__file__).resolve().parents[1]


class Foreign(Probe):
    """Log what no other probe does.

    Args:
        name: Prefix of the logged names.
    """

    section = "Outputs & co."
    quantities = (
        Quantity(
            "square",
            "mean squared output",
            unit="logit^2",
            scale="log",
            better="low",
            headline=True,
            heading="output",
        ),
        Quantity(
            "state",
            "state of the output",
            headline=True,
            codes=(Code(0, "small"), Code(1, "large", told="LARGE"), Code(-1, "?", "")),
        ),
        Quantity("part/<place>", "part of the output", panel="parts"),
        Quantity(
            "weight/<site>",
            "norm of the weight",
            scale="log",
            headline=True,
            over_sites="mean",
        ),
        Quantity("sizes", "sizes of outputs", form="spectrum"),
    )

    def __init__(self, name="foreign", **options):
        super().__init__(name, cadence=4, **options)

    def prepare(self, module, sites):
        self.layers = {s.name: s.module for s in sites if hasattr(s.module, "weight")}

    def measure(self, module, batch, reduce):
        with untouched(module, norm_mode=self.norm_mode, reduce=reduce) as run:
            output = run(lambda: self.forward_fn(module, batch))
        square = reduce(output.double().square().sum()) / 40
        values = {"square": square, "state": torch.tensor(1.0), "part/a": square / 2}
        values["sizes"] = torch.tensor([2.0, 1.0])
        for site, layer in self.layers.items():
            values[f"weight/{site}"] = layer.weight.norm()
        return values


class WithoutImages(RunHistory):
    """A run directory without pictures, which take most of a short run's time."""

    def log_image(self, *args, **kwargs):
        pass


def fit(folder, probes, **options):
    L.seed_everything(7, verbose=False)
    options = {"logger": WithoutImages(folder), **options}
    trainer = quiet_trainer(max_steps=8, callbacks=probes, **options)
    trainer.fit(FunctionalNet(), *loaders())
    return trainer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Runs with a probe of this file, as each of three loggers keeps them."""
    folder = tmp_path_factory.mktemp("foreign")
    loggers = [
        RunHistory(folder / "run"),
        WandbHistory("run", folder / "wb", offline=True),
        CSVLogger(folder, name="csv", version="run"),
    ]
    fit(
        folder / "run",
        [Foreign(), Foreign("again", norm_mode="train", log="all")],
        logger=loggers,
    )
    loggers[1].experiment.finish()
    complete(folder)
    return folder


def columns(document):
    return {column["key"]: column["title"] for column in document["columns"]}


@pytest.mark.parametrize("kind", ["run", "wb", "csv"])
def test_a_probe_of_another_package_has_columns_titles_and_panels(foreign, kind):
    (run,), skipped = read_runs([str(foreign / kind)])
    assert not skipped
    found = comparison_document([run])
    assert columns(found) == {
        "foreign/square": "output (foreign)",
        "foreign/weight": "norm of the weight (foreign)",
        "foreign/state": "state of the output (foreign)",
        "again/square": "output (again)",
        "again/weight": "norm of the weight (again)",
        "again/state": "state of the output (again)",
    } | {key: title for key, title in columns(found).items() if "/" not in key}
    (cells,) = found["table"]["runs"]
    assert cells["foreign/state"] == cells["again/state"] == "LARGE"
    assert cells["again/square"] == run.series["again_batch/square"].value[-1]
    sites = run.depth["foreign/weight"].values()
    assert cells["foreign/weight"] == sum(s.value[-1] for s in sites) / len(sites)
    assert not any(key.startswith("quantities") for key in run.config)
    described = found["quantities"]
    assert described["series"]["foreign/square"]["title"] == (
        "mean squared output (logit^2)"
    )
    assert described["series"]["foreign/part/a"]["title"] == "part of the output"
    assert described["series"]["foreign/seconds"]["title"] == "time taken (s)"
    assert described["depth"]["foreign/weight"]["scale"] == "log"
    declared = declared_of(run.quantities.values())
    panels = specification(make_workspace("e", "p", declared))
    for title, pattern in {
        "mean squared output": "^foreign(_batch)?/square$",
        "state of the output: 1 LARGE": "^again(_batch)?/state$",
        "norm of the weight": "^foreign(_batch)?/weight/",
        "parts": "^again(_batch)?/part/[^/]+$",
    }.items():
        assert f'"{title}"' in panels
        assert json.dumps(pattern)[1:-1] in panels
    assert '"Outputs & co."' in panels
    assert "Fisher" not in panels


def test_weights_and_biases_has_charts_of_a_probe_that_logs_all(foreign):
    (file,) = (foreign / "wb").glob("wandb/offline-run-*/*.wandb")
    rows = [r.history.item for kind, r in records(file) if kind == "history"]
    keys = {item.key or item.nested_key[0] for row in rows for item in row}
    again = {"charts/again_batch/weight_table", "histograms/again_batch/sizes_log10"}
    assert again <= keys
    assert not [key for key in keys if re.match("(charts|histograms)/foreign/", key)]
    (run,), _ = read_runs([str(foreign / "wb")])
    (plain,), _ = read_runs([str(foreign / "run")])
    for key in ("foreign/weight", "again_batch/weight"):
        assert run.depth[key].keys() == plain.depth[key].keys()


def test_declarations_are_in_the_summary_and_the_figures(foreign):
    quantities = read_run(foreign / "run").summary["quantities"]
    assert quantities["again_batch/square"] == {
        "probe": "again",
        "section": "Outputs & co.",
        "title": "mean squared output",
        "unit": "logit^2",
        "heading": "output",
        "scale": "log",
        "better": "low",
        "headline": True,
    }
    probe = Foreign()
    fit(foreign / "figures", [probe])
    figures = probe.figures()
    (axes, *_) = figures["foreign/weight"].axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("norm of the weight", "log")
    assert figures["foreign/sizes"].axes[0].get_ylabel() == "sizes of outputs"


def test_a_run_that_was_killed_keeps_what_its_probes_declared(tmp_path):
    class Killed(BaseException):
        pass

    class Kill(L.Callback):
        def on_train_batch_start(self, *_):
            # what a process finds that is killed here
            assert "foreign/square" in read_run(tmp_path / "a").summary["quantities"]
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path / "a", [Foreign(), Kill()])


@pytest.mark.ddp
def test_two_ranks_declare_what_one_does(tmp_path):
    quantities = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        path = tmp_path / str(devices)
        loggers = [WithoutImages(path / "run"), CSVLogger(path, "csv", "run")]
        fit(path, [Foreign()], logger=loggers, devices=devices, strategy=strategy)
        for kind in ("run", "csv"):
            (run,), _ = read_runs([str(path / kind)])
            quantities.append(run.quantities)
    assert "foreign/square" in quantities[0]
    assert all(one == quantities[0] for one in quantities)


def test_a_workspace_is_made_for_the_probes_of_the_runs_beside_the_project(
    foreign, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["compare", str(foreign / "run"), "me/mine", "--workspace"]) == 0
    assert "mean squared output" in (tmp_path / "workspace.me.mine.json").read_text()
    # a run alone is no project
    assert main(["compare", str(foreign / "run"), "--workspace"]) == 2


@pytest.mark.browser
def test_the_page_says_what_a_foreign_probe_measured(foreign, reader):
    runs, _ = read_runs([str(foreign / "run")])
    write_page(comparison_document(runs), foreign / "page.html")
    reader.look()
    reader.open(foreign / "page.html")
    reader.find(f"{TRAINING} select").click()
    reader.find(f"{TRAINING} option[value='foreign/state']").click()
    assert reader.texts(f"{TRAINING} .title") == ["state of the output"]
    assert "1 (LARGE)" in reader.texts(f"{TRAINING} .value")[0]
    reader.find(f"{TRAINING} option[value='foreign/square']").click()
    assert reader.texts(f"{TRAINING} .title") == ["mean squared output (logit^2)"]


@pytest.mark.parametrize(
    ("probe", "values", "text"),
    [
        (FIMEigenvalueProbe, {"rate_ratio": 9.0}, "9 times its bound"),
        (FIMEigenvalueProbe, {"lambda_max": 1e-9}, "lambda_max is 1e-09"),
        (MomentTracer, {"pathology": 2.0}, "Noise pathology"),
        (ActivationRateMonitor, {"dead/001.relu": 0.75}, "75% at 001.relu"),
        (StabilityProbe, {"eps_hyp": 0.5}, "moves the loss by 0.5"),
    ],
)
def test_findings_speak_of_a_probe_by_what_it_declares_not_by_its_name(
    tmp_path, probe, values, text
):
    named = {f"other/{name}": value for name, value in values.items()}
    run = make_run(tmp_path / "a", [{"step": 0, **named}])
    assert {f["name"] for f in document(run)["findings"]} <= {"nothing_measured"}
    declared = probe(name="other").declared()
    quantities = {key: one.row() for key, one in declared.items()}
    summary = {"status": "finished", "quantities": quantities}
    (run / "summary.json").write_text(json.dumps(summary))
    (finding,) = document(run)["findings"]
    assert text in finding["text"]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_every_value_that_a_probe_logs_is_declared(probe, tmp_path):
    one = StabilityProbe(num_twins=2) if probe is StabilityProbe else probe()
    module = FunctionalNet()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    if probe is StabilityProbe:
        module.drop.p = 0.0
    trainer = quiet_trainer(
        max_steps=2, callbacks=[one], logger=WithoutImages(tmp_path / "a")
    )
    trainer.fit(module, *loaders())
    (run,), _ = read_runs([str(tmp_path / "a")])
    own = [key for key in run.series if key.startswith(f"{one.name}/")]
    assert own
    assert [k for k in own if find_declared(one.declared(), k) is None] == []
    by_site = [key for key in run.depth if key.startswith(f"{one.name}/")]
    assert [k for k in by_site if f"{k}/<site>" not in one.declared()] == []
    for path in tmp_path.glob(f"a/tables/{one.name}/*.jsonl"):
        key = f"{one.name}/{path.stem}"
        assert path.stem == "by_depth" or find_declared(one.declared(), key)


@pytest.mark.parametrize("probe", [*PROBES, Foreign], ids=lambda probe: probe.__name__)
def test_the_documentation_of_a_probe_lists_what_it_declares(probe):
    text = inspect.getdoc(probe)
    (logs,) = re.findall(r"^Logs:\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    listed = re.findall(r"^    (\S+): \S", logs, re.MULTILINE)
    assert listed == [*probe().declared()]
    assert text.index("Logs:") < text.index("Args:")
    assert max(map(len, text.splitlines())) <= 88


def test_tables_in_the_documentation_name_declared_quantities():
    declared = declared_quantities(rows())
    named = []
    for path in (ROOT / "callbacks/README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in path.read_text().splitlines():
            if line.startswith("| "):
                named += re.findall(
                    r"`((?:fim|moments|activation|stability)/[\w/<>]+)`", line
                )
    assert len(named) > 15
    tables = {"moments/by_depth"}
    assert [
        key
        for key in named
        if key not in tables
        and key not in declared
        and find_declared(declared, key) is None
    ] == []


def test_what_compare_takes_for_runs_without_declarations_is_what_probes_declare():
    assert json.loads(PATH.read_text(encoding="utf-8")) == rows(), (
        "run tests/shipped_quantities.py"
    )


def test_an_earlier_run_has_the_columns_of_one_with_declarations():
    earlier = ROOT / "tests/data/earlier_run"
    assert "quantities" not in json.loads((earlier / "summary.json").read_text())
    (run,), _ = read_runs([str(earlier)])
    found = columns(comparison_document([run]))
    assert {key: title for key, title in found.items() if "/" in key} == {
        "val/accuracy": "val accuracy",
        "val/loss": "val loss",
        "fim/lambda_max": "lambda_max",
        "fim/rate_bound": "rate bound",
        "moments/effective_rank": "effective rank, last layer",
        "activation/dead": "dead units",
        "stability/eps_hyp": "eps_hyp",
    }


def test_a_declaration_is_read_back_as_it_was_written():
    for probe in (*PROBES, Foreign):
        declared = probe().declared()
        rows = json.loads(json.dumps({key: one.row() for key, one in declared.items()}))
        for key, one in declared_quantities(rows).items():
            assert one.row() == declared[key].row()
            assert one.identity == declared[key].identity
        assert rows.keys() == declared.keys()


@pytest.mark.parametrize(
    "value",
    [
        3,
        ["a"],
        None,
        {"depth": {"min": 1}},
        {"a/b": {"probe": "a", "section": "s", "title": ["t"]}},
        {"a": {"probe": "a", "section": "s", "title": "t"}},
        {3: {"probe": "a", "section": "s", "title": "t"}},
    ],
)
def test_quantities_that_are_another_projects_are_none_of_ours(value):
    assert declared_quantities(value) == {}


def test_of_a_declaration_that_a_later_version_wrote_the_known_part_is_read():
    row = {"probe": "p", "section": "s", "title": "t", "scale": "symlog", "new": [1]}
    row |= {"unit": 5, "codes": [[0, "a"], [1, "b", "B"]], "headline": "yes"}
    (one,) = declared_quantities({"p/q": row}).values()
    assert one == Declared(
        "p", "p", "s", Quantity("q", "t", codes=(Code(1, "b", "B"),))
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"title": ""}, "needs a name and a title"),
        ({"scale": "cubic"}, "scale of quantity 'q' is 'cubic'"),
        ({"better": "big"}, "better of quantity 'q' is 'big'"),
        ({"over_sites": "sum"}, "over_sites of quantity 'q' is 'sum'"),
        ({"form": "cloud"}, "form of quantity 'q' is 'cloud'"),
    ],
)
def test_a_declaration_that_cannot_be_right_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        Quantity(**{"name": "q", "title": "t", **options})


def test_a_number_among_no_codes_is_the_one_that_tells_nothing(tmp_path):
    fit(tmp_path / "a", [Foreign()])
    path = tmp_path / "a" / "history.jsonl"
    path.write_text(path.read_text().replace('state": 1.0', 'state": "NaN"'))
    (run,), _ = read_runs([str(tmp_path / "a")])
    assert run.verdicts == {"foreign/state": "?"}
    assert "foreign/state" not in columns(comparison_document([run]))


def test_the_readme_adds_a_probe_in_one_file(tmp_path, monkeypatch):
    text = (ROOT / "callbacks/README.md").read_text()
    scripts = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    L.seed_everything(0, verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: trainer(**options | quiet))
    scope = {"__name__": "readme"}
    exec("\n".join(scripts), scope)
    (line, *_) = Path("runs/plain/history.jsonl").read_text().splitlines()
    assert json.loads(line)["size/output"] > 0
    assert Path("runs/plain/figures/size/weight.png").exists()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    words = ["compare", "runs/plain"]
    assert main([*words, "--json", "a.json"]) == 0
    found = json.loads(Path("a.json").read_text())
    assert columns(found)["size/output"] == "mean squared output"
    assert found["quantities"]["depth"]["size/weight"]["title"] == "norm of the weight"
    assert "norm of the weight" in Path("compare.html").read_text()
    assert main([*words, "me/mine", "--workspace"]) == 0
    assert "^size(_batch)?/output$" in Path("workspace.me.mine.json").read_text()
    module, loader = FunctionalNet(), loaders()[1]
    trainer = quiet_trainer(callbacks=[scope["SizeMonitor"](norm_mode="eval")])
    trainer.validate(module, loader, verbose=False)
    with torch.no_grad():
        output = module.eval()(loader.dataset.tensors[0])
    measured = trainer.callback_metrics["size/output"].item()
    # float32 outputs, taken in other batches
    assert measured == pytest.approx(output.double().square().mean().item(), rel=1e-6)

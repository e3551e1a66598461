"""What an earlier version wrote is read: its run directory and its checkpoint.

`data/earlier_run` is a run of two epochs with four probes that the version before
the modules were moved wrote, without its figures and W&B files;
`earlier_run_unbroken.jsonl` is the history of the same run over three epochs. Where
something that configs name moves, its former path belongs into
`lit_resnorm.runs.files.FORMER_PATHS`.
"""

import json
import pydoc
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lit_resnorm.cli import main
from lit_resnorm.modules import LitResNetBN
from lit_resnorm.runs.files import FORMER_PATHS, read_run, with_present_paths
from lit_resnorm.runs.json_lines import read_rows

DATA = Path(__file__).with_name("data")
EARLIER = DATA / "earlier_run"
UNBROKEN = DATA / "earlier_run_unbroken.jsonl"
CHECKPOINT = EARLIER / "checkpoints" / "last.ckpt"
# What single-precision sums in another order, as on another processor, may become over
# twelve steps at this rate.
ROUNDING = 1e-3


def test_an_earlier_run_directory_is_read():
    run = read_run(EARLIER)
    assert run.summary["status"] == "finished"
    assert run.config["variant"] == "LitResNetBN"
    assert run.config["seed"] == 3
    assert run.history["step"].max() == 8
    assert {"fim/lambda_max", "moments/pathology", "stability/distance"} <= {
        *run.history.columns
    }


def test_an_earlier_run_is_compared(tmp_path):
    out = tmp_path / "compared.json"
    words = ["compare", str(EARLIER), "--out", "", "--json", str(out)]
    assert main(words) == 0
    document = json.loads(out.read_text())
    assert document["skipped"] == []
    assert [run["status"] for run in document["runs"]] == ["finished"]
    assert "fim/lambda_max" in document["series"]


@pytest.mark.parametrize("former", FORMER_PATHS)
def test_what_earlier_configs_name_is_found(former):
    present = with_present_paths({"callbacks": [{"class_path": former}]})
    path = present["callbacks"][0]["class_path"]
    assert path != former
    assert path.rpartition(".")[2] == pydoc.locate(path).__name__


def test_an_earlier_checkpoint_gives_the_module_back():
    module = LitResNetBN.load_from_checkpoint(CHECKPOINT, weights_only=True)
    saved = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert module.state_dict().keys() == saved.keys()
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, saved[name])


def test_an_earlier_checkpoint_is_diagnosed_with_the_config_of_its_run(tmp_path):
    out = tmp_path / "diagnosis.json"
    words = ["diagnose", "--checkpoint", str(CHECKPOINT), "--num_examples", "16"]
    assert main([*words, "--json", str(out)]) in (0, 3)
    assert json.loads(out.read_text())["network"] == "LitResNetBN"


# the run lies in another folder than when it was written
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_earlier_run_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_RESNORM_DATA", "")
    run = tmp_path / "runs" / "earlier" / "two"
    shutil.copytree(EARLIER, run, symlinks=True)
    config = yaml.safe_load((EARLIER / "config.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].startswith("lit_resnorm_callbacks."):
            callback["init_args"]["log"] = "all"  # as probes did then
            if callback["class_path"].endswith("FIMEigenvalueProbe"):
                callback["init_args"] |= {"spectrum": "always", "max_cost": 1e6}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", "config.yaml", "--run", "two", "--ckpt_path", "last"]
    assert main([*words, "--trainer.max_epochs", "3"]) == 0
    rows, unbroken = _third_epoch(run / "history.jsonl"), _third_epoch(UNBROKEN)
    assert [*map(list, rows)] == [*map(list, unbroken)]
    for row, expected in zip(rows, unbroken, strict=True):
        assert row == pytest.approx(expected, rel=ROUNDING, abs=1e-6)


def _third_epoch(path):
    rows = [row for row in read_rows(path) if row["step"] > 8]
    # Run times, and how far iterations went below their tolerance, are of the program
    # that measured; the values are of the network. Later versions log more.
    own = ("seconds", "/residual", "/saturated", "/optimizer_kind")
    return [{k: v for k, v in row.items() if not k.endswith(own)} for row in rows]

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_resnorm.compare import read_runs
from lit_resnorm.quantities import PLACES
from lit_resnorm.runs.files import read_run
from lit_resnorm.runs.wandb_offline import read_offline_wandb

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The run directory of README's first command."""
    root = tmp_path_factory.mktemp("quickstart")
    command = [*COMMAND, "--trainer.default_root_dir", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout
    (path,) = (root / "quickstart").iterdir()
    return path


@pytest.fixture(scope="module", params=["run directory", "offline W&B"])
def run(request, run_dir):
    if request.param == "run directory":
        return read_run(run_dir)
    (run,) = read_offline_wandb(run_dir)
    return run


@pytest.mark.slow
def test_the_quickstart_reaches_95_percent(run):
    assert run.history["test/accuracy"].dropna().item() >= 0.95
    assert run.summary["status"] == "finished"


@pytest.mark.slow
def test_it_logs_loss_accuracy_and_the_rate_of_every_hidden_layer(run, run_dir):
    history = run.history.set_index("step")
    epochs = run.config["config"]["trainer"]["max_epochs"]
    steps = epochs * 21
    assert history["train/loss"].count() == steps // 10
    for key in ("val/loss", "val/accuracy", "train/accuracy"):
        assert history[key].count() == epochs
    (read,), _ = read_runs([str(run_dir)])
    rates = read.depth["activation/rate"]
    blocks = run.config["depth"]
    assert len(rates) == blocks
    assert all(f"net.blocks.{i}." in site for i, site in enumerate(rates))
    for measured in rates.values():
        assert measured.step.tolist() == [*range(0, steps, 100), steps]
        assert ((measured.value >= 0) & (measured.value <= 1)).all()
    named = {key for key in history if key.startswith("activation/rate/")}
    assert named == {f"activation/rate/{place}" for place in PLACES}


@pytest.mark.slow
def test_it_logs_the_whole_config_once(run, run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    logged = {key: value for key, value in run.config.items() if key != "quantities"}
    assert logged == read_run(run_dir).config
    if logged != run.config:  # W&B has no other place for them
        assert run.config["quantities"] == summary["quantities"]
    init = run.config["config"]["model"]["init_args"]
    assert init["in_shape"] == [1, 8, 8]
    assert run.config["variant"] == "LitResNetBN"
    assert init["depth"] == run.config["depth"]
    assert 2 * run.config["depth"] >= 10

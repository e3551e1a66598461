"""A project that isn't ours, with probes at their defaults: what its user sees."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from offline import complete

from lit_resnorm.compare import comparison_document, read_runs

# Twins are trainings of their own: StabilityProbe's place is no short run.
PROBES = [
    "ActivationRateMonitor",
    "FIMEigenvalueProbe",
    "GradientMonitor",
    "MomentTracer",
]
# What the loggers and Lightning say of themselves in any run.
_OF_OTHERS = re.compile(
    r"(\x1b\[\S*m)?wandb|GPU available|TPU available|.*litlogger|Using bfloat16"
    r"|.*LeafSpec|\s"
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    script = Path(__file__).with_name("engineers_project.py")
    done = subprocess.run(
        [sys.executable, script, folder, *PROBES],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    complete(folder)
    return folder, done.stdout + done.stderr


@pytest.mark.slow
def test_a_foreign_project_has_few_keys_and_few_lines_of_log(fitted):
    folder, said = fitted
    header = (folder / "csv/metrics.csv").read_text().split("\n", 1)[0].split(",")
    assert {"fim/lambda_max", "moments/sensitivity/worst", "train_loss"} <= {*header}
    assert not [key for key in header if key.endswith("/failed")]
    assert len(header) <= 160
    lines = [line for line in said.splitlines() if line and not _OF_OTHERS.match(line)]
    assert len(lines) <= 15, lines


@pytest.mark.slow
def test_the_logs_of_a_foreign_fit_are_compared_as_one_run(fitted):
    folder, _ = fitted
    (run,), skipped = read_runs([str(folder)])
    assert not skipped
    assert len(run.logs) == 2
    assert run.status == "finished"
    document = comparison_document([run])
    (cells,) = document["table"]["runs"]
    assert (cells["depth"], cells["lr"]) == (6, 1e-3)
    (record,) = document["depth"]["moments/sensitivity"]
    # two residual branches a block
    assert record["across"] == "residual addition"
    assert len(record["axis"]) == 12
    assert document["findings"]

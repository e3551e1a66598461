"""A run whose W&B process dies amid it, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

from lit_resnorm.runs import RunHistory
from lit_resnorm.runs.files import read_run_rows
from lit_resnorm.runs.wandb import WandbHistory
from tests.small import FunctionalNet, loaders, quiet_trainer


class KillsWandb(L.Callback):
    """Kills W&B's own process after five steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 5:
            return
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        services = [line for line in listed.splitlines() if "wandb-core" in line]
        if not services:
            raise RuntimeError(f"no process of W&B among {listed!r}")
        for line in services:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        time.sleep(0.5)  # until the connection is closed


def run(folder):
    """Train for 16 steps with both loggers."""
    loggers = [RunHistory(folder / "run"), WandbHistory(save_dir=folder, offline=True)]
    trainer = quiet_trainer(max_epochs=2, logger=loggers, callbacks=[KillsWandb()])
    trainer.fit(FunctionalNet(), *loaders())


@pytest.mark.slow
def test_a_run_goes_on_where_the_process_of_wandb_dies(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.test_wandb_died", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("the process of W&B has died") == 1
    history = read_run_rows(tmp_path / "run")
    assert history.summary["status"] == "finished"
    assert [row["step"] for row in history.rows if "loss" in row] == [*range(16)]


if __name__ == "__main__":
    run(Path(sys.argv[1]))

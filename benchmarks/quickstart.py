"""What the shipped defaults cost: quickstart's whole `fit` over a bare Trainer's.

    uv run benchmarks/quickstart.py [--repeats 5] [--epochs 20]

Both train the same network for the same steps on the same tensors, in this process,
interleaved. The bare Trainer has no logger, no callback, no checkpoint and no bar, a
plain DataLoader, and a module that does nothing but cross entropy. The quickstart has
all its defaults: W&B offline, RunHistory, bar, checkpoints, monitor, test at the end.
CPU time of the process, medians; the wall clock beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_resnorm.cli import main
from lit_resnorm.data import Digits
from lit_resnorm.modules import LitResNetBN

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Bare(L.LightningModule):
    """The quickstart's network with nothing around it."""

    def __init__(self) -> None:
        super().__init__()
        options = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]
        self.rate = options["optimizer"]["init_args"]
        self.net = LitResNetBN(depth=options["depth"], width=options["width"]).net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy."""
        del batch_idx
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the quickstart's optimizer."""
        return torch.optim.SGD(self.parameters(), **self.rate)


def bare(epochs: int) -> None:
    """Train with a bare Trainer."""
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    L.seed_everything(0, verbose=False)
    x, y = zip(*[(b[0], b[1]) for b in data.train_dataloader()], strict=True)
    dataset = torch.utils.data.TensorDataset(torch.cat(x), torch.cat(y))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Bare(), DataLoader(dataset, data.batch_size, shuffle=True))


def quickstart(epochs: int) -> None:
    """Run the quickstart's command."""
    with tempfile.TemporaryDirectory() as root:
        arguments = ["fit", "--config", str(CONFIG), "--trainer.default_root_dir", root]
        status = main([*arguments, "--trainer.max_epochs", str(epochs)])
    if status:
        raise RuntimeError(f"the quickstart ended with status {status}")


def timed(function: Callable[[int], None], epochs: int) -> tuple[float, float]:
    """Return CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function(epochs)
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"bare Trainer": bare, "quickstart": quickstart}
    for way in ways.values():
        timed(way, 1)
    times = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            times[name].append(timed(way, arguments.epochs))
    medians = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    base = medians["bare Trainer"]
    print(f"{'':14} {'CPU s':>8} {'wall s':>8} {'CPU ratio':>10}")
    for name, (cpu, wall) in medians.items():
        print(f"{name:14} {cpu:8.2f} {wall:8.2f} {cpu / base[0]:10.2f}")

"""Time of a fit with K twins, beside a fit without them and K separate fits.

Run: `python benchmarks/stability.py [num_twins] [steps]`, on one core. With
`--quickstart` whole commands are timed: the quickstart's `fit`, with and without twins.
"""

import argparse
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lit_resnorm.data import Digits
from lit_resnorm.modules import LitMLP, LitResNet, LitResNetBN
from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm_callbacks import StabilityProbe

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
}


def fit_seconds(
    make: Callable[[], LitClassifier], steps: int, num_twins: int | None
) -> float:
    """Return the processor time of one whole fit, validation included."""
    seed_everything(0, verbose=False)
    callbacks: list[Callback] = []
    if num_twins is not None:
        callbacks.append(StabilityProbe(num_twins))
    started = time.process_time()
    trainer = Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make(), Digits())
    return time.process_time() - started


def command_seconds(folder: str, num_twins: int | None) -> float:
    """Return the processor time of the quickstart as a command of its own."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "train.py", "fit", "--trainer.default_root_dir", folder]
    command += ["--config", "configs/quickstart.yaml"]
    if num_twins is not None:
        probe = "{class_path: lit_resnorm_callbacks.StabilityProbe, init_args: "
        probe += f"{{num_twins: {num_twins}}}}}"
        command.append(f"--trainer.callbacks+={probe}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def time_quickstart(num_twins: int) -> None:
    """Print what the quickstart's command costs with and without twins."""
    with tempfile.TemporaryDirectory() as folder:
        bare = command_seconds(folder, None)
        twins = command_seconds(folder, num_twins)
    ratio = twins / (num_twins * bare)
    print(f"quickstart {bare:.1f} s, with {num_twins} twins {twins:.1f} s: {ratio:.2f}")


def main() -> None:
    """Print one row a network and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_twins", type=int, nargs="?", default=16)
    parser.add_argument("steps", type=int, nargs="?", default=300)
    parser.add_argument("--quickstart", action="store_true")
    options = parser.parse_args()
    if options.quickstart:
        time_quickstart(options.num_twins)
        return
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    num, steps = options.num_twins, options.steps
    print(f"{num} twins, {steps} steps of 64 digits, depth 5, width 128; seconds")
    print(f"{'net':12} {'optimizer':9} {'bare':>6} {'twins':>6} {num:>4} runs   ratio")
    for net in (LitMLP, LitResNet, LitResNetBN):
        for name, optimizer in OPTIMIZERS.items():
            make = partial(net, 5, 128, optimizer=optimizer)
            times = [
                (fit_seconds(make, steps, None), fit_seconds(make, steps, num))
                for _ in range(2)
            ]
            bare, twins = map(statistics.median, zip(*times, strict=True))
            ratio = twins / (num * bare)
            print(
                f"{net.__name__:12} {name:9} {bare:6.2f} {twins:6.2f} {num * bare:9.2f}"
                f"   {ratio:.2f}"
            )


if __name__ == "__main__":
    main()

"""Time of a population, beside its members trained one after another.

Run: `python benchmarks/population.py [num_members] [steps]`, on one core.
"""

import argparse
import logging
import time
import warnings
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_resnorm.data import Digits
from lit_resnorm.modules import LitMLP, LitResNet, LitResNetBN
from lit_resnorm.population import Population


def fit_seconds(module: LightningModule, steps: int) -> float:
    """Return the processor time of one whole fit, validation included."""
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(module, Digits())
    return time.process_time() - started


def main() -> None:
    """Print one row a network and kind of population."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_members", type=int, nargs="?", default=32)
    parser.add_argument("steps", type=int, nargs="?", default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    num, steps = options.num_members, options.steps
    kinds = {
        "seeds": [{"seed": i} for i in range(num)],
        "rates": [{"seed": i, "lr": 1e-3 * 1.05**i} for i in range(num)],
    }
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    print(f"{num} members, {steps} steps of 64 digits, SGD with momentum; seconds")
    print(f"{'net':12} {'depth':>5} {'width':>5} {'differ in':9} together  {num} runs")
    for net, depth, width in (
        (LitMLP, 10, 64),
        (LitResNet, 5, 64),
        (LitResNetBN, 5, 64),
    ):
        make = partial(net, depth, width, optimizer=sgd)
        fit_seconds(make(), 20)
        alone = num * min(fit_seconds(make(), steps) for _ in range(3))
        for kind, members in kinds.items():
            together = fit_seconds(Population(make, members), steps)
            print(
                f"{net.__name__:12} {depth:5} {width:5} {kind:9} {together:8.2f}"
                f" {alone:8.2f}   {alone / together:.1f} times as fast"
            )


if __name__ == "__main__":
    main()

"""What monitors cost: one measurement in forward passes, and training slowed by.

Run: `python benchmarks/monitors.py [--repeats N]`, on one core. Torchexplorer and delve
are timed where they are installed.

W1 is a fully connected net (9 hidden layers of 128, batch 256), W2 a CIFAR ResNet-20
(batch 128), both with random inputs. Times are processor time, medians of interleaved
repeats. A monitor that acts every k-th step slows training by its cost over k steps.
"""

import argparse
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from work_items import ITEMS

from lit_resnorm.measures.activation import activation_rates
from lit_resnorm.measures.moments import flow_between_sites, signal_and_noise
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    GradientMonitor,
    HeadroomProbe,
    MomentTracer,
    Probe,
)


class Module(L.LightningModule):
    """A network trained with SGD, timing its bare steps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class StepTimer(L.Callback):
    """Times each step; stands first, so that no other callback is in it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Start the clock."""
        self._started = time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        """Stop it."""
        self.times.append(time.process_time() - self._started)


class IterationTimer(L.Callback):
    """Times each iteration, with all that callbacks do in it."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Note the time."""
        self.starts.append(time.process_time())


def timed(probe: Probe) -> list[float]:
    """Return a list that gets the time of each of the probe's measurements."""
    run, times = probe.run, []

    def clocked(trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        started = time.process_time()
        run(trainer, module, step)
        times.append(time.process_time() - started)

    vars(probe)["run"] = clocked
    return times


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict:
    """Return each function's median processor time over interleaved repeats."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            started = time.process_time()
            function()
            if turn:  # the first turn warms up
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def report_measurements(name: str, repeats: int) -> None:
    """Print one measurement of each measure in forward passes."""
    make, shape = ITEMS[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(shape)
    flow = flow_between_sites(net, x)

    def forward() -> None:
        with torch.no_grad():
            net(x)

    medians = interleaved(
        {
            "forward": forward,
            "activation rates": lambda: activation_rates(net, x, sites=""),
            "moments and noise": lambda: signal_and_noise(
                net, x, sites=flow, effective_rank=False
            ),
            "with effective ranks": lambda: signal_and_noise(net, x, sites=flow),
        },
        repeats,
    )
    unit = medians.pop("forward")
    print(f"\n{name}: one measurement, in forward passes of {unit * 1e3:.1f} ms")
    for label, seconds in medians.items():
        print(f"  {label:32} {seconds / unit:6.2f}")
    ranked = sum(site.kind != "norm" for site in flow.sites)
    extra = medians["with effective ranks"] - medians["moments and noise"]
    print(f"  {'an effective rank':32} {extra / unit / ranked:6.2f}")


def report_training(name: str, repeats: int) -> None:
    """Print what our probes at their default cadence add to a bare step."""
    make, shape = ITEMS[name]
    torch.manual_seed(0)
    size = shape[0]
    data = TensorDataset(torch.randn(shape), torch.randint(10, (size,)))
    loader = DataLoader(data, size)
    kinds = (FIMEigenvalueProbe, ActivationRateMonitor, MomentTracer)
    cadences = {kind.__name__: kind().cadence.every_n_steps for kind in kinds}
    probes = {
        kind.__name__: kind(cadence=1, num_examples=size, dataloader=loader)
        for kind in kinds
    }
    timer = StepTimer()
    costs = {label: timed(probe) for label, probe in probes.items()}
    trainer = L.Trainer(
        max_steps=repeats + 1,
        callbacks=[timer, *probes.values()],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(make()), loader)
    step = statistics.median(timer.times[1:])
    print(f"\n{name}: training slowed by, in percent of a step of {step * 1e3:.1f} ms")
    total = 0.0
    for label, times in costs.items():
        measurement = statistics.median(times[1:])
        slowed = measurement / step / cadences[label]
        total += slowed
        print(
            f"  {label:32} {100 * slowed:6.2f}"
            f"   ({measurement / step:.2f} steps every {cadences[label]})"
        )
    print(f"  {'together':32} {100 * total:6.2f}")


STEP_PROBES = {
    "GradientMonitor": (lambda **o: GradientMonitor(noise_cadence=None, **o), 100),
    "  its noise scale": (lambda **o: GradientMonitor(noise_cadence=1, **o), 1000),
    "HeadroomProbe": (HeadroomProbe, 100),
}
"""What makes a probe of steps, and the steps between its measurements."""


def report_steps(name: str, repeats: int) -> None:
    """Print what probes of the run's steps cost, in steps of the same run."""
    make, shape = ITEMS[name]
    print(f"\n{name}: probes of steps, one measurement in training steps")
    found = {}
    for label, (kind, every) in STEP_PROBES.items():
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(shape), torch.randint(10, shape[:1]))
        loader = DataLoader(data, shape[0])
        timer = IterationTimer()
        trainer = L.Trainer(
            max_steps=4 * (repeats + 1),
            callbacks=[timer, kind(cadence=4, dataloader=loader)],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(make()), loader)
        ends = zip(timer.starts[1:], timer.starts[:-1], strict=True)
        times = [end - start for end, start in ends][4:]
        # every fourth measures, the one before it stands by, the others are bare
        measuring, bare, idle, before = (
            statistics.median(times[i::4]) for i in range(4)
        )
        bare = (bare + idle) / 2
        found[label] = (measuring + before - 2 * bare) / bare
        if label == "  its noise scale":
            found[label] -= found["GradientMonitor"]
        print(
            f"  {label:32} {found[label]:6.2f}"
            f"   ({100 * found[label] / every:.2f} % every {every}; a step takes"
            f" {bare * 1e3:.1f} ms)"
        )


@contextmanager
def weights_and_biases(net: nn.Module) -> Iterator[Callable[[], None]]:
    """Watch with W&B, offline, gradients and weights at every step."""
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(silent=True, console="off")
        with wandb.init(mode="offline", dir=folder, settings=settings) as run:
            run.watch(net, log="all", log_freq=1)
            yield lambda: run.log({"loss": 0.0})
            run.unwatch(net)


@contextmanager
def torchexplorer(net: nn.Module) -> Iterator[Callable[[], None]]:
    """Watch with torchexplorer at every step, drawing nothing."""
    import torchexplorer  # pyright: ignore[reportMissingImports]

    torchexplorer.watch(net, log_freq=1, backend="none", verbose=False)
    yield lambda: None


@contextmanager
def delve(net: nn.Module) -> Iterator[Callable[[], None]]:
    """Follow the saturation of layers with delve at every step."""
    from delve.torchcallback import (  # pyright: ignore[reportMissingImports]
        CheckLayerSat,
    )

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        monitor = CheckLayerSat(folder, "csv", net, stats=["lsat"], device="cpu")
        yield monitor.add_saturations
        monitor.close()


PEERS = {
    "wandb": (weights_and_biases, 1000, 'wandb.watch(log="all")'),
    "torchexplorer": (torchexplorer, 500, "torchexplorer.watch()"),
    "delve": (delve, 1, "delve CheckLayerSat()"),
}


def report_peers(name: str, repeats: int) -> None:
    """Print what other monitors add to a bare step."""
    make, shape = ITEMS[name]
    print(f"\n{name}: other monitors, a step with over a step without")
    for package, (watch, default, label) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"  {label:32} not installed")
            continue
        torch.manual_seed(0)
        nets = make(), make()
        try:
            with watch(nets[1]) as log:
                bare = stepper(nets[0], shape, lambda: None)
                watched = stepper(nets[1], shape, log)
                medians = interleaved({"bare": bare, "watched": watched}, repeats)
        except Exception as error:  # another tool's; the next is measured
            print(f"  {label:32} fails on this network ({type(error).__name__})")
            continue
        ratio = medians["watched"] / medians["bare"]
        print(
            f"  {label:32} {ratio:6.2f} every step,"
            f" {1 + (ratio - 1) / 100:.3f} every 100,"
            f" {1 + (ratio - 1) / default:.4f} every {default} (default)"
        )


def stepper(
    net: nn.Module, shape: tuple[int, ...], log: Callable[[], None]
) -> Callable[[], None]:
    """Return one training step of a network, and what follows it."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        log()

    return step


def main() -> None:
    """Print the tables of both work items."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["WANDB_SILENT"] = "true"
    for name in ("W1", "W2"):
        report_measurements(name, repeats)
        report_training(name, repeats)
        report_steps(name, repeats)
        report_peers(name, repeats)


if __name__ == "__main__":
    main()

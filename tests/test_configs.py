"""Every shipped YAML builds what it names, and that trains for two steps."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader, TensorDataset

import lit_resnorm.data
from lit_resnorm.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if "sweeps" not in path.parts
)
SLOW = {"model/resnet110", "model/wide", "trainer/ddp", "data/whitened_cifar10_pair"}
SHAPES = {f"model/tiny_mac_{letter}": "[1,28,28]" for letter in "abc"}
TRAINER = [
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
]
NET = ["--model", "LitResNetBN", "--model.depth", "2", "--model.width", "8"]
IMAGES = ["--data", f"{__name__}.RandomImages"]


class RandomImages(LightningDataModule):
    """Gaussian inputs of any shape with random labels."""

    def __init__(self, shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        self.input_shape, self.num_classes = tuple(shape), classes

    def train_dataloader(self):
        random = torch.Generator().manual_seed(0)
        x = torch.randn(8, *self.input_shape, generator=random)
        y = torch.arange(8) % self.num_classes
        return DataLoader(TensorDataset(x, y), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def stand_in(config):
    """Return options for random data of the shape that a config's data have."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    data = parser.instantiate(parser.parse_object({"data": config["data"]}))["data"]
    shape = ",".join(map(str, data.input_shape))
    return [*IMAGES, f"--data.shape=[{shape}]", f"--data.classes={data.num_classes}"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS],
)
def test_a_shipped_config_trains_for_two_steps(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "test_configs", sys.modules[__name__])
    file = ROOT / "configs" / f"{name}.yaml"
    config = yaml.safe_load(file.read_text())
    args = ["fit", "--config", str(file), *TRAINER]
    args += [] if "model" in config else NET
    if "data" not in config:
        args += [*IMAGES, f"--data.shape={SHAPES.get(name, '[3,16,16]')}"]
    trainer = config.get("trainer", {})
    if "logger" not in trainer:
        args += ["--trainer.logger", "RunHistory"]
    if trainer.get("devices") == 2:
        args += ["--trainer.strategy", "ddp_fork"]
    if trainer.get("accelerator") == "gpu" and not torch.cuda.is_available():
        args += ["--trainer.accelerator", "cpu"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    status = main(args)
    if status and "data.root" in capsys.readouterr().err:
        # the files aren't on this machine
        status = main([*args, *stand_in(config)])
    assert status == 0
    assert len(list(Path("runs").glob("*/*/history.jsonl"))) == 1


def test_there_is_a_config_for_every_callback_and_data_set():
    given = set()
    for name in CONFIGS:
        config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        callbacks = config.get("trainer", {})
        callbacks = callbacks.get("callbacks+") or callbacks.get("callbacks") or []
        parts = [config.get("model"), config.get("data"), *callbacks]
        given |= {part["class_path"].rpartition(".")[2] for part in parts if part}
    data = set(lit_resnorm.data.__all__) - {"DataModule", "StepSeed"}
    assert data <= given

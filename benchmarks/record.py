"""The numbers of a fixed set of runs, to show that a change of the code leaves them.

Run: `python benchmarks/record.py write FILE.json` before and after the change, then
`python benchmarks/record.py compare BEFORE.json AFTER.json`, which exits with 1 and
names what differs unless all is equal to the last bit. Run times, dates, folders and
the modules in which classes lie are left out.

Recorded are every shipped probe on three networks, with their weights after training;
`compare --json` of these runs and a population; `diagnose --json` on four configs; and
five `reproduce` items at small scale. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_resnorm.cli import main as lit_resnorm

NETWORKS = {
    "res2_bn": ("LitResNetBN", {"depth": 3, "width": 16}),
    "vanilla": ("LitVanillaNet", {"depth": 6, "width": 16}),
    "preact": ("LitPreactResNet", {"depth": 2, "width": 4}),
}
DIAGNOSED = {
    "vanilla": ("LitVanillaNet", {"depth": 40, "width": 32}, []),
    "res2_bn": ("LitResNetBN", {"depth": 5, "width": 32}, ["--check-rate"]),
    "skipinit": ("LitSkipInit", {"depth": 10, "width": 32}, []),
    "mse": ("LitMLP", {"depth": 5, "width": 32, "loss": "mse"}, []),
}
ITEMS = (
    "furusho2020.fig3",
    "furusho2020.fig4",
    "furusho2020.fig6",
    "furusho_sep.angles",
    "labatie2019.nobn",
)
PROBES: list[dict[str, Any]] = [
    {"class_path": "lit_resnorm_callbacks.ActivationRateMonitor"},
    {"class_path": "lit_resnorm_callbacks.MomentTracer"},
    {
        "class_path": "lit_resnorm_callbacks.FIMEigenvalueProbe",
        "init_args": {
            "per_layer": True,
            "num_eigenvalues": 10,
            "max_cost": 1e6,
            "spectrum": "always",
        },
    },
    {
        "class_path": "lit_resnorm_callbacks.StabilityProbe",
        "init_args": {"num_twins": 2},
    },
]
_UNRECORDED = re.compile(
    r"(.*/)?(seconds|seconds_.*|made|version|versions|commit|folder|path|root)"
)
_CLASS = re.compile(r"\blit_resnorm\w*\.(?:\w+\.)*([A-Z]\w+)")


def write(path: Path) -> None:
    """Run everything in a folder of its own, and write what came out."""
    path = path.resolve()
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        record = {
            "runs": _runs(),
            "compare": _compared(),
            "diagnose": _diagnosed(),
            "reproduce": _reproduced(),
        }
        os.chdir(path.parent)
    text = json.dumps(_recorded(record), indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _run(*words: str, allowed: tuple[int, ...] = (0,)) -> None:
    status = lit_resnorm([*words, "--traceback"])
    if status not in allowed:
        raise RuntimeError(f"lit-resnorm {' '.join(words)} ended with {status}")


def _config(name: str, variant: str, init: dict[str, Any], probes: Any) -> str:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    model = {"class_path": variant, "init_args": {**init, "optimizer": sgd}}
    config = {
        "seed_everything": 0,
        "experiment": "record",
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 6,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": probes,
        },
        "model": model,
        "data": {"class_path": "Digits"},
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return f"{name}.yaml"


def _probes() -> list[dict[str, Any]]:
    shared = {"cadence": 5, "num_examples": 48, "log": "all"}
    return [
        {**probe, "init_args": {**shared, **probe.get("init_args", {})}}
        for probe in PROBES
    ]


def _runs() -> dict[str, Any]:
    """Train the networks and a population; return histories, tables and weights."""
    files = {
        name: _config(name, variant, init, _probes())
        for name, (variant, init) in NETWORKS.items()
    }
    files["population"] = "population.yaml"
    config = yaml.safe_load(Path("res2_bn.yaml").read_text(encoding="utf-8"))
    config["trainer"]["callbacks"] = []
    members = [{"seed": 0}, {"seed": 1, "lr": 0.02}, {"seed": 2, "label_noise": 0.2}]
    config["data"]["init_args"] = {"with_index": True}
    config["model"] = {
        "class_path": "lit_resnorm.population.Population",
        "init_args": {"model": config["model"], "members": members},
    }
    Path("population.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    found = {}
    for name, file in files.items():
        _run("fit", "--config", file, "--run", name)
        folder = Path("runs/record") / name
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        found[name] = {
            "history": _rows(folder / "history.jsonl"),
            "tables": {
                str(path.relative_to(folder / "tables")): _rows(path)
                for path in sorted(folder.glob("tables/**/*.jsonl"))
            },
            "weights": {
                key: _digest(value) for key, value in checkpoint["state_dict"].items()
            },
        }
    return found


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(path: Path) -> list[dict[str, str]]:
    # as text: floats are written with all their digits
    return [*csv.DictReader(path.read_text(encoding="utf-8").splitlines())]


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def _compared() -> Any:
    runs = [f"runs/record/{name}" for name in (*NETWORKS, "population")]
    _run("compare", *runs, "--out", "", "--json", "compare.json")
    return json.loads(Path("compare.json").read_text(encoding="utf-8"))


def _diagnosed() -> dict[str, Any]:
    found = {}
    for name, (variant, init, options) in DIAGNOSED.items():
        file = _config(f"diagnosed_{name}", variant, init, [])
        out = f"{name}.json"
        _run("diagnose", "--config", file, *options, "--json", out, allowed=(0, 3))
        found[name] = json.loads(Path(out).read_text(encoding="utf-8"))
    return found


def _reproduced() -> dict[str, Any]:
    out = Path("reproduced")
    options = ("--scale", "small", "--jobs", "1", "--out", str(out))
    _run("reproduce", *ITEMS, *options, allowed=(0, 1))
    return {
        item: {
            "curves": _table(out / item / "curves.csv"),
            "verdict": json.loads((out / item / "verdict.json").read_text("utf-8")),
        }
        for item in ITEMS
    }


def _recorded(value: Any) -> Any:
    """Return a value without what may change from run to run."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not _UNRECORDED.fullmatch(k)}
        return {_CLASS.sub(r"\1", k): _recorded(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_recorded(one) for one in value]
    if isinstance(value, str):
        return _CLASS.sub(r"\1", value)
    return value


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each place where two records differ; NaN equals NaN."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            inner = f"{place}/{key}"
            if key not in after or key not in before:
                yield f"{inner}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], inner)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries before, {len(after)} after"
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{place}/{index}")
    elif json.dumps(before) != json.dumps(after):
        yield f"{place}: {before!r} before, {after!r} after"


def main() -> int:
    """Write a record, or compare two; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("file", type=Path)
    pair = commands.add_parser("compare")
    pair.add_argument("before", type=Path)
    pair.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "write":
        write(options.file)
        return 0
    before, after = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (options.before, options.after)
    )
    found = list(differences(before, after))
    sys.stdout.write("".join(f"{line}\n" for line in found) or "equal to the bit\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

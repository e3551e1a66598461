"""Run directories written by hand, and their comparison."""

import json

import yaml

from lit_resnorm.compare import comparison_document, read_runs


def make_run(
    path, rows, *, seed=0, lr=0.1, variant="LitResNet", status="finished", **trainer
):
    """Write a run directory; `trainer` are settings of the Trainer."""
    path.mkdir(parents=True)
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}
    init = {"depth": 3, "width": 8, "activation": "relu", "optimizer": optimizer}
    config = {
        "seed_everything": seed,
        "trainer": {
            "default_root_dir": str(path),
            "callbacks": [{"class_path": "a.Probe", "init_args": {"cadence": 5}}],
            **trainer,
        },
        "model": {"class_path": f"lit_resnorm.modules.{variant}", "init_args": init},
        "data": {"class_path": "Digits", "init_args": {"batch_size": 64, "root": "/x"}},
        "run": path.name,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    text = "".join(json.dumps({"epoch": 0, **row}) + "\n" for row in rows)
    (path / "history.jsonl").write_text(text)
    if status:
        (path / "summary.json").write_text(json.dumps({"status": status}))
    return path


def losses(*values):
    return [
        {
            "step": 10 * i,
            "train/loss": v,
            "val/accuracy": None if isinstance(v, str) else v / 10,
        }
        for i, v in enumerate(values)
    ]


def document(*words, by=None, **options):
    runs, skipped = read_runs([str(word) for word in words])
    found = comparison_document(runs, skipped, by, **options)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found

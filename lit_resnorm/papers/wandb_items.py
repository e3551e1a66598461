"""Verdicts, curves and figures of items in Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import wandb

from lit_resnorm.papers.results import CURVES

__all__ = ["log_item"]


def log_item(verdict: dict[str, Any], folder: Path) -> None:
    """Send an item's results as one run; offline unless `WANDB_MODE` says otherwise.

    Args:
        verdict: The content of `verdict.json`.
        folder: The item's folder.
    """
    mode = os.environ.get("WANDB_MODE", "offline")
    keys = ("item", "scale", "settings", "seeds", "versions", "commit")
    with wandb.init(
        project="lit-resnorm-papers",
        name=f"{verdict['item']}-{verdict['scale']}",
        dir=str(folder),
        mode=mode,  # pyright: ignore[reportArgumentType]
        config={key: verdict[key] for key in keys},
    ) as run:
        checks = pd.DataFrame(verdict["checks"]).astype(str)
        run.log(
            {
                "passed": verdict["passed"],
                "checks": wandb.Table(dataframe=checks),
                "curves": wandb.Table(dataframe=pd.read_csv(folder / CURVES)),
                "figure": wandb.Image(str(folder / "figure.png")),
            }
        )

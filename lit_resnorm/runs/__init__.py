"""Run directories: written as a run goes, and read back.

The loggers need Lightning, the rest doesn't: what is exported is imported when used.
"""

from typing import TYPE_CHECKING

from lit_resnorm import exported

if TYPE_CHECKING:
    from lit_resnorm.runs.files import Run, read_run
    from lit_resnorm.runs.history import RunHistory
    from lit_resnorm.runs.resuming import ExactResume
    from lit_resnorm.runs.wandb import WandbHistory
    from lit_resnorm.runs.wandb_offline import read_offline_wandb

__all__ = [
    "ExactResume",
    "Run",
    "RunHistory",
    "WandbHistory",
    "read_offline_wandb",
    "read_run",
]

__getattr__ = exported(
    __name__,
    {
        "ExactResume": "resuming",
        "Run": "files",
        "RunHistory": "history",
        "WandbHistory": "wandb",
        "read_offline_wandb": "wandb_offline",
        "read_run": "files",
    },
)

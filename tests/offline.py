"""Offline W&B runs whose files are complete."""

import time
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2 as pb

from lit_resnorm.runs.wandb_offline import _frames


def records(file):
    """Yield kind and record of a run's file."""
    for frame in _frames(Path(file)):
        record = pb.Record.FromString(frame)
        yield record.WhichOneof("record_type"), record


def complete(folder, seconds=60):
    """Have W&B's service leave, and wait until all runs below hold their end.

    The service writes a file's last block when it leaves, and a busy machine lets it
    take its time.
    """
    wandb.teardown()
    end = time.monotonic() + seconds
    for file in Path(folder).glob("**/run-*.wandb"):
        while "exit" not in {kind for kind, _ in records(file)}:
            assert time.monotonic() < end, f"{file} has no end within {seconds} s"
            time.sleep(0.05)

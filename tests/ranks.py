"""Functions run on several ranks: gloo processes by forking, 0.2 s a run."""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def sum_over_ranks(tensor):
    """A `Reduce` over the processes of :func:`run_ranks`."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def run_ranks(function, world_size, *args):
    """Return `[function(rank, *args) for each rank]`, each run in its own process.

    A rank that waits for a collective which others never make fails after a minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [
            context.Process(
                target=_rank, args=(function, rank, world_size, folder, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        results = []
        for rank, process in enumerate(processes):
            if process.exitcode != 0:
                error = Path(folder, f"{rank}.err")
                raise RuntimeError(
                    error.read_text() if error.exists() else f"rank {rank} hung"
                )
            results.append(torch.load(Path(folder, f"{rank}.pt"), weights_only=False))
        return results


def _rank(function, rank, world_size, folder, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.err").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)

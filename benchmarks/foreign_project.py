"""What probes at their defaults add to the project of an engineer, in one run.

Run: `python benchmarks/foreign_project.py [PROBE...]`, on one core; by default every
probe that the package exports. The project (`tests/foreign/engineers_project.py`) is a
vision transformer of six blocks (0.7 M parameters), trained for 100 steps of 64
pictures with AdamW in bf16, without loggers. Times are processor time, so that other
programs don't count; each probe's is set against the bare training before it.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch

import lit_resnorm_callbacks
from lit_resnorm_callbacks import Probe

sys.path.append(str(Path(__file__).parents[1] / "tests" / "foreign"))
from engineers_project import fit

SETTINGS = {"hidden_dim": 96, "batch_size": 64, "loggers": False}


def every_probe() -> list[type[Probe]]:
    """Return the probes that the package exports."""
    exported = (
        getattr(lit_resnorm_callbacks, name) for name in lit_resnorm_callbacks.__all__
    )
    return [
        one
        for one in exported
        if isinstance(one, type) and issubclass(one, Probe) and one is not Probe
    ]


def seconds(probes: list[L.Callback]) -> float:
    """Return the processor time that the training takes."""
    began = time.process_time()
    fit(None, probes, **SETTINGS)
    return time.process_time() - began


def main() -> None:
    """Time the training bare and with each probe, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("probes", nargs="*", metavar="PROBE")
    names = parser.parse_args().probes
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kinds = [one for one in every_probe() if not names or one.__name__ in names]
    seconds([])  # imports, and torch's first use of its kernels
    for kind in kinds:
        bare = seconds([])
        probed = seconds([kind()])
        print(
            f"{kind.__name__:28} {probed / bare - 1:+8.1%}"
            f"   ({probed:.1f} s, bare {bare:.1f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Spectra on which iterations for the largest eigenvalues err, and how they do there.

Each is a list of all eigenvalues, descending. The operator is a diagonal matrix whose
entries are shuffled anew for each start: a random start is then a random direction, and
so are the fresh directions that the iterations draw for themselves.
"""

import torch
from torch import Tensor

from lit_resnorm.measures.spectra import Eigenpairs, top_eigenpairs


def _close(gap: float) -> Tensor:
    top = 1 - gap * torch.arange(6, dtype=torch.float64)
    return torch.cat([top, torch.logspace(-0.4, -4, 74, dtype=torch.float64)])


def _spectrum(*values: float, zeros: int = 0) -> Tensor:
    whole = torch.tensor([*values, *[0.0] * zeros], dtype=torch.float64)
    return whole.sort(descending=True).values


SPECTRA = {
    "1e-2 apart": _close(1e-2),
    "1e-3 apart": _close(1e-3),
    "1e-4 apart": _close(1e-4),
    "two close": torch.cat(
        [
            _spectrum(1.0, 0.991, *torch.linspace(0.6, 0.3, 7).tolist()),
            torch.logspace(-1, -4, 120, dtype=torch.float64),
        ]
    ),
    "multiple": _spectrum(*[3.0] * 4, *[2.0] * 3, *torch.linspace(1, 0, 60).tolist()),
    "multiple below": _spectrum(5.0, 4.0, *[1.0] * 12, *[0.1] * 40),
    "rank 3": _spectrum(2.0, 1.5, 0.2, zeros=57),
    "rank 1": _spectrum(1.0, zeros=39),
    "geometric": torch.logspace(0, -9, 60, dtype=torch.float64),
    "slowly geometric": 0.9 ** torch.arange(90, dtype=torch.float64),
    "flat": torch.ones(40, dtype=torch.float64),
    "nearly flat": torch.linspace(1, 0.9, 50, dtype=torch.float64),
    "two clusters": torch.cat(
        [
            torch.linspace(1, 0.995, 5, dtype=torch.float64),
            torch.linspace(0.1, 0.09, 95, dtype=torch.float64),
        ]
    ),
    "outliers": torch.cat(
        [
            torch.linspace(1000, 100, 9, dtype=torch.float64),
            torch.linspace(1, 0, 91, dtype=torch.float64),
        ]
    ),
    "hidden in many": _spectrum(1.02, *[1.0] * 30, *[0.2] * 60),
    "one dimension": _spectrum(0.7),
    "two dimensions": _spectrum(0.7, 0.7),
    "zero": _spectrum(zeros=30),
}


def measured(
    values: Tensor, k: int, tol: float, generator: torch.Generator, **options: object
) -> tuple[Eigenpairs, float]:
    """Return what a random start finds, and its worst error over the allowed one."""
    order = torch.randperm(len(values), generator=generator)
    num = int(torch.randint(1, 4, (), generator=generator))
    start_DB = torch.randn(len(values), num, generator=generator, dtype=torch.float64)
    found = top_eigenpairs(
        lambda v: values[order, None] * v, start_DB, k, tol=tol, **options
    )
    expected = values[:k]
    # The iterations allow 32 roundings of the largest value, and as many again are
    # those of the comparison.
    rounding = 64 * torch.finfo(torch.float64).eps * float(values[0])
    error = (found.values - expected).abs()
    return found, float((error / (tol * expected + rounding).clamp_min(1e-300)).max())

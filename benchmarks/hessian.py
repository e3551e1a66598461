"""What the ends of the Hessian's spectrum cost, beside pyhessian.

    OMP_NUM_THREADS=1 uv run --group bench benchmarks/hessian.py [--items W1 W2 W3]

Cost is CPU time of the call over CPU time of one training step (forward and backward
pass of the same batch), measured in the same process before and after; the median of
`--repeats`. pyhessian iterates until two estimates of the eigenvalue are within its
tolerance, which says nothing of the error; ours is certified. Errors are relative to
`hessian_spectrum` at a tolerance of 1e-6; above 1e-3 they are marked `!`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from work_items import ITEMS, work_item

from lit_resnorm.measures import hessian_spectrum
from lit_resnorm.measures.fisher import Examinations


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", nargs="+", default=[*ITEMS], choices=ITEMS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| item | route | steps | error |\n|---|---|---|---|")
    for item in options.items:
        net, x, y = work_item(item)
        exact = largest(net, x, y, tol=1e-6)
        for name, route in routes(net, x, y).items():
            steps, found = cost(route, net, x, y, options.repeats)
            error = abs(found / exact - 1)
            mark = "!" if error > 1e-3 else ""
            print(f"| {item} | {name} | {steps:.3g} | {error:.0e}{mark} |", flush=True)


def routes(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], float]]:
    """Return what is compared, by name: functions that return the eigenvalue."""
    known = Examinations()
    ours: dict[str, Callable[[], float]] = {
        "lambda_max to 1e-3": lambda: largest(net, x, y, examinations=known),
        "and lambda_min to a tenth": lambda: largest(
            net, x, y, smallest_tol=0.1, examinations=known
        ),
        "and the trace, 10 vectors": lambda: largest(
            net, x, y, smallest_tol=0.1, num_trace_vectors=10, examinations=known
        ),
    }
    try:
        import pyhessian
    except ModuleNotFoundError:
        return ours

    def peer(tol: float) -> float:
        found = pyhessian.hessian(net, nn.CrossEntropyLoss(), (x, y), cuda=False)
        return found.eigenvalues(maxIter=100, tol=tol, top_n=1)[0][0]

    return {
        **ours,
        "pyhessian, tolerance 1e-3": lambda: peer(1e-3),
        "pyhessian, tolerance 1e-4": lambda: peer(1e-4),
    }


def largest(net: nn.Module, x: Tensor, y: Tensor, **options: object) -> float:
    """Return the largest eigenvalue."""
    asked = {"smallest_tol": None, "num_trace_vectors": 0, **options}
    return hessian_spectrum(net, (x, y), norm_mode="eval", **asked).max


def cost(
    route: Callable[[], float], net: nn.Module, x: Tensor, y: Tensor, repeats: int
) -> tuple[float, float]:
    """Return the cost in training steps, and what the route found."""
    found, ratios = route(), []
    for _ in range(repeats):
        before = step_time(net, x, y)
        start = time.process_time()
        route()
        call = time.process_time() - start
        ratios.append(2 * call / (before + step_time(net, x, y)))
    return statistics.median(ratios), found


def step_time(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the CPU time of a forward and backward pass, in seconds."""
    times = []
    for _ in range(5):
        start = time.process_time()
        torch.autograd.grad(F.cross_entropy(net(x), y), [*net.parameters()])
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()

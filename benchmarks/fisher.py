"""What the Fisher matrix costs, beside other tools and plain `torch.func`.

    OMP_NUM_THREADS=1 uv run --group bench benchmarks/fisher.py [--items W1 W2 W3]

Cost is CPU time of the call over CPU time of one training step (forward and backward
pass of the same batch), both measured in the same process and interleaved; the median
of `--repeats` after a warm-up. `+` is the growth of the process's peak memory over that
after training steps. Errors are relative to `fisher_spectrum` in float64 (itself tested
against explicit matrices): of the trace, or the largest among the eigenvalues asked
for, down to 1e-4 of the first; above 1e-3 they are marked `!`. One process a cell, with
a time limit; a tool that is not installed, does not answer or fails is shown so.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings

import torch
from fisher_routes import QUESTIONS, ROUTES
from torch import Tensor, nn
from torch.nn import functional as F
from work_items import ITEMS, work_item

from lit_resnorm.measures.fisher import fisher_spectrum


def main() -> None:
    """Print the table, or measure one cell where `--cell` names it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", nargs="+", default=[*ITEMS], choices=ITEMS)
    parser.add_argument("--routes", nargs="+", default=[*ROUTES], choices=ROUTES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds a cell")
    parser.add_argument("--cell", nargs=3, metavar=("ITEM", "ROUTE", "QUESTION"))
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measured(*options.cell, options.repeats)))
        return
    for item in options.items:
        print(f"\n| {item} | {' | '.join(QUESTIONS)} |\n|---{'|---' * 4}|")
        for route in options.routes:
            cells = [
                cell(item, route, question, options.repeats, options.limit)
                for question in QUESTIONS
            ]
            print(f"| {route} | {' | '.join(cells)} |", flush=True)


def cell(item: str, route: str, question: str, repeats: int, limit: float) -> str:
    """Return one cell of the table, measured in a process of its own."""
    command = [sys.executable, __file__, "--cell", item, route, question]
    command += ["--repeats", str(repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "too slow"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        kinds = {"fisher_routes.NoRoute": "-", "ModuleNotFoundError": "absent"}
        return kinds.get(last.partition(":")[0], "fails")
    found = json.loads(done.stdout.splitlines()[-1])
    mark = "!" if found["error"] > 1e-3 else ""
    return (
        f"{found['steps']:.3g} (+{found['mebibytes']:.0f} MiB, {found['error']:.0e}"
        f"{mark})"
    )


def measured(item: str, route: str, question: str, repeats: int) -> dict[str, float]:
    """Return cost in steps, memory and error of one cell."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    net, x, y = work_item(item)
    train_step(net, x, y)
    before = peak_mebibytes()
    answer = ROUTES[route](net, x, y, question)  # a warm-up
    memory = peak_mebibytes() - before
    ratios = []
    for _ in range(repeats):
        if route.endswith("followed"):
            nudge(net, x, y)
        step = statistics.median(cpu_time(train_step, net, x, y) for _ in range(3))
        call = cpu_time(ROUTES[route], net, x, y, question)
        after = statistics.median(cpu_time(train_step, net, x, y) for _ in range(3))
        ratios.append(call / (step / 2 + after / 2))
    if route.endswith("followed"):
        answer = ROUTES[route](net, x, y, question)
    return {
        "steps": statistics.median(ratios),
        "mebibytes": memory,
        "error": error(net, x, question, answer),
    }


def error(net: nn.Module, x: Tensor, question: str, answer: list[float]) -> float:
    """Return the answer's relative error, against float64."""
    found = fisher_spectrum(
        net.double(),
        x.double(),
        norm_mode="eval",
        num_eigenvalues=0 if question == "trace" else None,
    )
    if question == "trace":
        return abs(answer[0] / found.trace - 1)
    count = {"top 1": 1, "top 10": 10}.get(question, len(found.eigenvalues))
    expected = found.eigenvalues[:count]
    expected = expected[expected > 1e-4 * expected[0]]
    values = torch.tensor(answer[: len(expected)], dtype=torch.float64)
    return float((values / expected - 1).abs().max())


def train_step(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Make one forward and backward pass."""
    torch.autograd.grad(F.cross_entropy(net(x), y), [*net.parameters()])


def nudge(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Make one training step at a tenth of the rate bound."""
    rate = 0.1 * fisher_spectrum(net, x, norm_mode="eval", num_eigenvalues=1).rate_bound
    parameters = [*net.parameters()]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.sub_(rate * grad)


def cpu_time(function: object, *args: object) -> float:
    """Return the CPU time of a call, in seconds."""
    start = time.process_time()
    function(*args)  # type: ignore[operator]
    return time.process_time() - start


def peak_mebibytes() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

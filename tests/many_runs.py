"""A comparison of many runs with long curves, made without any training."""

import math

from comparisons import run_entry


def many_seeds(variants=10, seeds=10, points=500, quantities=10):
    """Return a comparison of `variants * seeds` runs with long curves."""
    runs, groups, cells, group_cells = [], [], [], []
    for variant in range(variants):
        label = f"Variant{variant}, depth 10"
        members = range(variant * seeds, (variant + 1) * seeds)
        groups.append({"label": label, "runs": list(members)})
        for run in members:
            runs.append(run_entry(f"v{variant}-{run}", variant, label, run))
            accuracy = 0.5 + 0.04 * variant + 0.001 * (run % seeds)
            cells.append({"variant": f"Variant{variant}", "lr": 0.1, "acc": accuracy})
        accuracies = [cells[run]["acc"] for run in members]
        mean = sum(accuracies) / seeds
        spread = (sum((a - mean) ** 2 for a in accuracies) / (seeds - 1)) ** 0.5
        rate = {"mean": 0.1, "std": 0.0, "count": seeds}
        accuracy = {"mean": mean, "std": spread, "count": seeds}
        group_cells.append({"variant": None, "lr": rate, "acc": accuracy})
    steps = [10 * k for k in range(points)]
    series, group_series = {}, {}
    for quantity in range(quantities):
        key = f"probe/quantity{quantity}"
        series[key] = [
            {"run": run, "step": steps, "value": _wiggle(run, quantity, steps)}
            for run in range(len(runs))
        ]
        group_series[key] = [
            {
                "group": group,
                "step": steps,
                "mean": _wiggle(group, quantity, steps),
                "std": [0.1 + 0.001 * (k % 7) for k in range(points)],
                "count": [seeds] * points,
            }
            for group in range(variants)
        ]
    return {
        "format": 1,
        "title": f"{len(runs)} runs",
        "made": "2026-11-21T13:50:00+00:00",
        "version": "0.1.0",
        "by": ["variant", "depth"],
        "differences": [{"key": "seed", "values": list(range(len(runs)))}],
        "runs": runs,
        "groups": groups,
        "columns": [
            {"key": "variant", "title": "variant", "better": None},
            {"key": "lr", "title": "lr", "better": None, "digits": 4},
            {"key": "acc", "title": "accuracy", "better": "high", "digits": 4},
        ],
        "table": {"runs": cells, "groups": group_cells},
        "series": series,
        "group_series": group_series,
        "findings": [
            {"run": run, "severity": "warn", "text": "It is slow.", "source": None}
            for run in range(0, len(runs), 3)
        ],
    }


def _wiggle(run, quantity, steps):
    return [
        1 + run + math.sin(step / (50 + quantity)) + math.cos(step * (run + 3)) / 3
        for step in steps
    ]

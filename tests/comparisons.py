"""Comparison documents that tests of the page share, made without any training."""

import math

VARIANTS = ("LitVanillaNet", "LitResNet", "LitResNetBN", "LitBNFeedForward")
DEPTH = 30
STEPS = list(range(0, 421, 20))


def run_entry(name, group, variant, seed, status="finished"):
    return {
        "name": name,
        "source": f"runs/digits/{name}",
        "kind": "directory",
        "group": group,
        "status": status,
        "verdicts": {"moments/pathology": "signal" if group == 0 else "none"},
        "seconds": 12.5,
        "config": {"variant": variant, "depth": DEPTH, "seed": seed, "lr": 0.01},
    }


def _curve(run, start, end, speed, breaks_at=None):
    value = [end + (start - end) * math.exp(-speed * step) for step in STEPS]
    if breaks_at is not None:
        value = [
            "NaN" if step >= breaks_at else start * math.exp(step / 40)
            for step in STEPS
        ]
    return {"run": run, "step": list(STEPS), "value": value}


def _by_depth(run, first, ratio, num_sites=DEPTH):
    steps = [0, 100, 200, 300, 400, 420]
    sites = [f"{k:03d}.net.blocks.{k}.act" for k in range(num_sites)]
    values = [
        [first * (ratio + 0.00005 * step * (1 - ratio)) ** k for k in range(num_sites)]
        for step in steps
    ]
    return {"run": run, "steps": steps, "sites": sites, "values": values}


FINDINGS = [
    (
        0,
        "bad",
        "The signal collapses with depth: the effective rank falls from 18.0 at the"
        " first site to 1.05 at the last.",
        "Labatie 2019, section 4",
    ),
    (0, "warn", "It learned nothing: accuracy 0.101 is that of a guess.", None),
    (
        1,
        "bad",
        "It diverged: train/loss is not finite from step 300 on. The learning rate 0.01"
        " was 4.2 times the bound 0.00238.",
        "Furusho & Ikeda 2020, equation 12",
    ),
    (2, "good", "No pathology of signal or noise; the rate is below its bound.", None),
    (3, "bad", "Noise drowns the signal: sensitivity grows as exp(0.21 l).", None),
    (
        None,
        "info",
        "The runs differ in the variant alone, so that the differences are its.",
        None,
    ),
]


def four_variants():
    """Return a comparison of four variants, one of which diverged, and one unread."""
    runs = [
        run_entry(
            variant.lower(),
            index,
            variant,
            0,
            "diverged" if variant == "LitResNet" else "finished",
        )
        for index, variant in enumerate(VARIANTS)
    ]
    accuracy = [0.101, "NaN", 0.9812, 0.6233]
    loss = [2.3026, "NaN", 0.0713, 1.2345]
    rank = [1.05, 3.4, 14.2, 8.8]
    cells = [
        {
            "variant": variant,
            "depth": DEPTH,
            "test/acc": accuracy[index],
            "val/loss": loss[index],
            "moments/rank": rank[index],
            "fim/rate_bound": None if index == 3 else 0.0023 * (index + 1),
        }
        for index, variant in enumerate(VARIANTS)
    ]
    return {
        "format": 1,
        "title": "4 runs",
        "made": "2026-11-21T13:50:00+00:00",
        "version": "0.1.0",
        "skipped": [
            {"name": "runs/digits/broken", "reason": "history.jsonl, line 3: no JSON"}
        ],
        "by": ["variant", "depth"],
        "differences": [{"key": "variant", "values": list(VARIANTS)}],
        "same": {"depth": DEPTH, "lr": 0.01, "config.trainer.max_epochs": 20},
        "runs": runs,
        "groups": [
            {
                "label": f"{variant}, depth {DEPTH}",
                "key": {"variant": variant, "depth": DEPTH},
                "runs": [index],
            }
            for index, variant in enumerate(VARIANTS)
        ],
        "columns": [
            {"key": "variant", "title": "variant", "better": None},
            {"key": "depth", "title": "depth", "better": None},
            {"key": "test/acc", "title": "accuracy", "better": "high", "digits": 4},
            {"key": "val/loss", "title": "loss", "better": "low", "digits": 4},
            {"key": "moments/rank", "title": "rank at the end", "better": "high"},
            {"key": "fim/rate_bound", "title": "rate bound", "better": None},
        ],
        "table": {"runs": cells, "groups": [{} for _ in runs]},
        "series": _series(),
        "group_series": {},
        "depth": _depth(),
        "findings": [
            {"run": run, "severity": severity, "text": text, "source": source}
            for run, severity, text, source in FINDINGS
        ],
    }


def _depth():
    return {
        "moments/effective_rank": [
            _by_depth(0, 18.0, 0.9),
            _by_depth(1, 18.0, 0.95),
            _by_depth(2, 18.0, 0.992),
            _by_depth(3, 18.0, 0.977, num_sites=20),
        ],
        "moments/sensitivity": [
            _by_depth(0, 1.0, 1.02),
            _by_depth(2, 1.0, 1.03),
            _by_depth(3, 1.0, 1.23, num_sites=20),
        ],
        "activation/dead": [_by_depth(2, 0.02, 1.01), _by_depth(0, 0.01, 1.1)],
    }


def _series():
    return {
        "train/loss": [
            _curve(0, 2.31, 2.3026, 0.01),
            _curve(1, 2.5, 0.0, 0.0, breaks_at=300),
            _curve(2, 2.4, 0.02, 0.02),
            _curve(3, 2.4, 1.1, 0.008),
        ],
        "val/loss": [
            _curve(0, 2.31, 2.3026, 0.01),
            _curve(2, 2.4, 0.0713, 0.018),
            _curve(3, 2.4, 1.2345, 0.008),
        ],
        "val/accuracy": [
            _curve(0, 0.08, 0.101, 0.1),
            _curve(2, 0.1, 0.9812, 0.02),
            _curve(3, 0.1, 0.6233, 0.006),
        ],
        **{
            f"fim/top/{rank:02d}": [
                _curve(run, 90.0 / rank, 30.0 / rank, 0.01) for run in (0, 2)
            ]
            for rank in range(1, 11)
        },
        "fim/lambda_max": [
            _curve(0, 210.0, 12.0, 0.01),
            _curve(1, 840.0, 2500.0, 0.01),
            _curve(2, 211.0, 31.0, 0.02),
        ],
    }


HOSTILE = (
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 2'>\"><svg onload=window.hurt=3>",
    "../../etc/passwd\u2028' onclick='window.hurt = 4' x='",
    "${window.hurt = 5} <!-- <script> javascript:window.hurt=6",
)


def hostile():
    """Return a comparison whose every text tries to break out of the page."""
    document = four_variants()
    document["title"] = HOSTILE[0]
    for index, run in enumerate(document["runs"]):
        run["name"], run["source"] = HOSTILE[index], HOSTILE[index]
        run["config"] = {HOSTILE[0]: HOSTILE[index]}
    for index, group in enumerate(document["groups"]):
        group["label"] = f"group {HOSTILE[index]}"
    document["skipped"] = [{"name": HOSTILE[1], "reason": HOSTILE[0]}]
    document["differences"] = [{"key": HOSTILE[0], "values": list(HOSTILE)}]
    document["same"] = {HOSTILE[1]: HOSTILE[2]}
    document["columns"].append(
        {"key": HOSTILE[0], "title": HOSTILE[1], "better": "low", "digits": 4}
    )
    for index, cells in enumerate(document["table"]["runs"]):
        cells[HOSTILE[0]] = HOSTILE[index]
    for finding in document["findings"]:
        finding["text"], finding["source"] = HOSTILE[0], HOSTILE[1]
    for part in ("series", "depth"):
        document[part] = {
            **document[part],
            f"val/loss{HOSTILE[0]}": next(iter(document[part].values())),
        }
    record = document["depth"]["activation/dead"][0]
    record["sites"] = [HOSTILE[k % 4] for k in range(len(record["sites"]))]
    return document

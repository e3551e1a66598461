"""The comparison as plain JSON: what the page embeds and `--json` writes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from lit_resnorm.compare.recorded import Recorded
from lit_resnorm.run_files import plain


def comparison_document(
    runs: Sequence[Recorded],
    skipped: Sequence[dict[str, str]] = (),
    by: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the comparison of runs.

    Args:
        runs: The runs, as `read_runs` returns them.
        skipped: `name` and `reason` of what could not be read.
        by: Config keys by which runs are grouped; None: those of `grouping.DEFAULT_BY`.
    """
    number = len(runs)
    return {
        "format": 1,
        "title": runs[0].name if number == 1 else f"{number} runs",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": metadata.version("lit-resnorm"),
        "skipped": list(skipped),
        "by": list(by or ()),
        "differences": [],
        "same": {},
        "runs": [
            {
                "name": run.name,
                "source": run.source,
                "kind": run.kind,
                "group": index,
                "status": run.status,
                "verdicts": dict(run.verdicts),
                "seconds": run.seconds,
                "config": dict(run.config),
            }
            for index, run in enumerate(runs)
        ],
        "groups": [
            {"label": run.name, "key": {}, "runs": [index]}
            for index, run in enumerate(runs)
        ],
        "columns": [],
        "table": {"runs": [{} for _ in runs], "groups": [{} for _ in runs]},
        "series": {
            key: [
                {
                    "run": index,
                    "step": run.series[key].step.tolist(),
                    "value": [plain(value) for value in run.series[key].value.tolist()],
                }
                for index, run in enumerate(runs)
                if key in run.series
            ]
            for key in sorted({key for run in runs for key in run.series})
        },
        "group_series": {},
        "depth": {},
        "findings": [],
    }

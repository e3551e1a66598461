"""W&B workspaces and reports with panels for what the probes log.

Without a connection, or without credentials, what would be saved is written to a file:
the JSON that the W&B client sends. Nothing is sent unless a user asks for a workspace
or a report.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_resnorm.compare.telling import DEFAULT_BY
from lit_resnorm.errors import UsageError

_STEP = "trainer/global_step"
_NAME = "lit_resnorm"

# Section; its curves over training (what a key matches), and which axes are log.
_CURVES: dict[str, list[tuple[str, str, bool]]] = {
    "Training": [
        ("loss", "^(train|val|test)/loss$", True),
        ("accuracy", "^(train|val|test)/accuracy$", False),
        ("generalization gap", "^generalization_gap$", False),
    ],
    "Fisher information": [
        ("largest eigenvalue", "^fim(_batch)?/lambda_max$", True),
        ("rate and its bound", "^fim(_batch)?/(rate|rate_bound)$", True),
        ("rate over its bound", "^fim(_batch)?/rate_ratio$", True),
    ],
    "Signal and noise": [
        ("pathology: 1 signal, 2 noise", "^moments/pathology$", False),
        ("growth of the sensitivity", "^moments/(log_slope|power_exponent)$", False),
        ("effective rank by site", "^moments/effective_rank/", True),
        ("sensitivity by site", "^moments/sensitivity/", True),
    ],
    "Activations": [
        ("mean rate", "^activation/rate_mean$", False),
        ("dead units by site", "^activation/dead/", False),
    ],
    "Stability": [
        ("hypothesis stability", "^stability/eps_hyp$", True),
        ("distance of the twins", "^stability/distance$", True),
    ],
}


def save_views(project: str, *, workspace: bool, report: bool) -> list[Path]:
    """Save a workspace, a report, or both, and print where they are.

    Args:
        project: `entity/project`.
        workspace: Whether to save a workspace.
        report: Whether to save a report, as a draft.

    Returns:
        The files that were written instead, in the current directory.

    Raises:
        UsageError: If wandb-workspaces isn't installed.
        OSError: If a file can't be written.
    """
    try:
        import wandb_workspaces  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise UsageError(
            "--workspace, --report: wandb-workspaces is not installed"
            " (pip install 'lit-resnorm[workspaces]')"
        ) from error
    entity, _, name = project.partition("/")
    asked = {"workspace": workspace, "report": report}
    make = {"workspace": make_workspace, "report": make_report}
    reason = _no_connection()
    files = []
    for kind in (kind for kind, wanted in asked.items() if wanted):
        view = make[kind](entity, name)
        if reason is None:
            try:
                view.save(draft=True) if kind == "report" else view.save()
            except Exception as error:  # whatever the client raises, nothing is lost
                reason = " ".join(str(error).split()) or type(error).__name__
        if reason is None:
            sys.stdout.write(f"W&B {kind}: {view.url}\n")
            continue
        path = Path(f"{kind}.{entity}.{name}.json")
        path.write_text(specification(view) + "\n", encoding="utf-8")
        sys.stdout.write(f"W&B {kind} not saved ({reason}); what it holds: {path}\n")
        files.append(path)
    return files


def specification(view: Any) -> str:
    """Return the JSON that the client would send for a workspace or report."""
    # there is no public way to it
    return view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)


def make_workspace(entity: str, project: str) -> Any:
    """Return a workspace (of wandb-workspaces) with a section for each probe."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, is_open=name != "Stability", panels=[*_lines(name)])
        for name in _CURVES
    ]
    sections.insert(0, ws.Section(name="Runs", is_open=True, panels=[*_overview()]))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_NAME,
        settings=ws.WorkspaceSettings(x_axis=_STEP),
        sections=sections,
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(key) for key in ("variant", "depth", "lr")]
        ),
    )


def make_report(entity: str, project: str) -> Any:
    """Return a report (of wandb-workspaces) with the same panels."""
    wr = _reports()
    blocks: list[Any] = [wr.H1("Runs"), _grid(_overview())]
    for name in _CURVES:
        blocks += [wr.H1(name), _grid(_lines(name))]
    # the names of entity and project in a run set would be looked up on the server
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{_NAME}: {project}",
        description="Skip connections, normalisation, and what they do to training.",
        blocks=blocks,
    )


def _grid(panels: Iterator[Any]) -> Any:
    wr = _reports()
    return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=[*panels])


def _lines(section: str) -> Iterator[Any]:
    wr = _reports()
    for title, pattern, is_log in _CURVES[section]:
        yield wr.LinePlot(title=title, x=_STEP, metric_regex=pattern, log_y=is_log)


def _overview() -> Iterator[Any]:
    """Yield what compares whole runs: configs, accuracy and measures by parallel axes.

    The summary's keys are those that `WandbHistory` writes.
    """
    wr = _reports()
    configs = [key for key in DEFAULT_BY if key != "data"]
    measured = ("fim/lambda_max.last", "moments/power_exponent.last")
    accuracy = "val/accuracy.max"
    yield wr.ParallelCoordinatesPlot(
        title="configs to accuracy",
        columns=[
            *(wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in configs),
            *(
                wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key))
                for key in (*measured, accuracy)
            ),
        ],
    )
    yield wr.ScatterPlot(
        title="largest rate over its bound, and accuracy",
        x=wr.SummaryMetric("fim/rate_ratio.max"),
        y=wr.SummaryMetric(accuracy),
        log_x=True,
    )
    yield wr.RunComparer(diff_only="split")


def _reports() -> Any:
    # as Any: a part of its names is imported there, but not exported
    import wandb_workspaces.reports.v2

    return wandb_workspaces.reports.v2


def _no_connection() -> str | None:
    """Return why W&B's server can't be reached, or None where it can."""
    import wandb

    try:
        if not wandb.login(prompt=False):
            return "no W&B API key is configured: see `wandb login`"
        wandb.Api(timeout=30)
    except (wandb.Error, OSError, ValueError) as error:
        return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return None

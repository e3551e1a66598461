"""W&B workspaces and reports with panels for what the probes log.

Without a connection, or without credentials, what would be saved is written to a file:
the JSON that the W&B client sends. Nothing is sent unless a user asks for a workspace
or a report.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_resnorm.compare.grouping import DEFAULT_BY
from lit_resnorm.errors import UsageError, printable
from lit_resnorm.quantities import Declared, name_pattern
from lit_resnorm.runs.files import STEP_KEY

_WORKSPACE_NAME = "lit_resnorm"

_Curve = tuple[str, str, bool]
"""Title; what a key matches; whether the vertical axis is log."""

_TRAINING: list[_Curve] = [
    ("loss", "^(train|val|test)/loss$", True),
    ("accuracy", "^(train|val|test)/accuracy$", False),
    ("generalization gap", "^generalization_gap$", False),
]


def _curves(declared: Iterable[Declared]) -> dict[str, list[_Curve]]:
    """Return the curves over training by section: of training, and of each probe."""
    shared: dict[tuple[str, str, str], list[Declared]] = {}
    for one in declared:
        if title := one.quantity.panel_title:
            shared.setdefault((one.section, one.probe, title), []).append(one)
    curves: dict[str, list[_Curve]] = {"Training": _TRAINING}
    for (section, probe, title), together in shared.items():
        names = [name_pattern(one.quantity.stem) for one in together]
        end = "/" if together[0].quantity.by_site else "$"
        name = names[0] if len(names) == 1 else f"({'|'.join(names)})"
        # where batch norm couples examples, names begin otherwise
        pattern = f"^{re.escape(probe)}(_batch)?/{name}{end}"
        is_log = all(one.quantity.scale == "log" for one in together)
        curves.setdefault(section, []).append((title, pattern, is_log))
    return curves


def save_views(
    project: str,
    declared: Sequence[Declared],
    *,
    workspace: bool,
    report: bool,
) -> list[Path]:
    """Save a workspace, a report, or both, and print where they are.

    Args:
        project: `entity/project`.
        declared: What the probes of its runs log.
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
        view = make[kind](entity, name, declared)
        if reason is None:
            try:
                view.save(draft=True) if kind == "report" else view.save()
            except Exception as error:  # whatever the client raises, nothing is lost
                reason = " ".join(str(error).split()) or type(error).__name__
        if reason is None:
            sys.stdout.write(f"W&B {kind}: {printable(view.url)}\n")
            continue
        path = Path(f"{kind}.{entity}.{name}.json")
        path.write_text(specification(view) + "\n", encoding="utf-8")
        told = printable(f"not saved ({reason}); what it holds: {path}")
        sys.stdout.write(f"W&B {kind} {told}\n")
        files.append(path)
    return files


def specification(view: Any) -> str:
    """Return the JSON that the client would send for a workspace or report."""
    # there is no public way to it
    return view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)


def make_workspace(entity: str, project: str, declared: Sequence[Declared]) -> Any:
    """Return a workspace (of wandb-workspaces) with a section for each probe."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name="Runs", is_open=True, panels=[*_overview(declared)])]
    sections += [
        ws.Section(name=name, is_open=True, panels=[*_line_plots(curves)])
        for name, curves in _curves(declared).items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_WORKSPACE_NAME,
        settings=ws.WorkspaceSettings(x_axis=STEP_KEY),
        sections=sections,
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(key) for key in ("variant", "depth", "lr")]
        ),
    )


def make_report(entity: str, project: str, declared: Sequence[Declared]) -> Any:
    """Return a report (of wandb-workspaces) with the same panels."""
    wr = _reports()
    blocks: list[Any] = [wr.H1("Runs"), _grid(_overview(declared))]
    for name, curves in _curves(declared).items():
        blocks += [wr.H1(name), _grid(_line_plots(curves))]
    # the names of entity and project in a run set would be looked up on the server
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{_WORKSPACE_NAME}: {project}",
        description="Skip connections, normalisation, and what they do to training.",
        blocks=blocks,
    )


def _grid(panels: Iterator[Any]) -> Any:
    wr = _reports()
    return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=[*panels])


def _line_plots(curves: Iterable[_Curve]) -> Iterator[Any]:
    wr = _reports()
    for title, pattern, is_log in curves:
        yield wr.LinePlot(title=title, x=STEP_KEY, metric_regex=pattern, log_y=is_log)


def _overview(declared: Sequence[Declared]) -> Iterator[Any]:
    """Yield what compares whole runs: configs, accuracy and measures by parallel axes.

    The summary's keys are those that `WandbHistory` writes.
    """
    wr = _reports()
    configs = [key for key in DEFAULT_BY if key != "data"]
    measured = [f"{key}.last" for key in _main(declared)]
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
    for one in declared:
        if one.quantity.name == "rate_ratio":
            yield wr.ScatterPlot(
                title="largest rate over its bound, and accuracy",
                x=wr.SummaryMetric(f"{one.key}.max"),
                y=wr.SummaryMetric(accuracy),
                log_x=True,
            )
    yield wr.RunComparer(diff_only="split")


def _main(declared: Iterable[Declared]) -> list[str]:
    """Return the first headline number of two probes.

    Not of all: W&B leaves a run out that lacks the value of one axis.
    """
    found: dict[str, str] = {}
    for one in declared:
        quantity = one.quantity
        if quantity.headline and not quantity.by_site and not quantity.codes:
            found.setdefault(one.probe, one.key)
    return [*found.values()][:2]


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

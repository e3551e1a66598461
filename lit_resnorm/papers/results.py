"""What an item leaves on disk: finished cells, curves, figure and verdict."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.papers.item import Cell, Check, Item, Row, Settings, outcome
from lit_resnorm.runs.files import installed_versions
from lit_resnorm.runs.json_lines import plain, replace_file

__all__ = ["Results", "canonical", "results_key"]

KEY = "key"
VERDICT = "verdict.json"
CURVES = "curves.csv"
PAPERS = "lit_resnorm.papers."
_PACKAGES = ("lit-resnorm", "torch", "lightning", "numpy", "scipy", "joblib")


def canonical(value: Any) -> str:
    """Return JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def results_key(item: Item, settings: Settings, seed: int) -> str:
    """Return the key under which an item's results can be used again.

    It changes with settings, seed and version, and with any source file that can change
    a number: all but the command line, and the other items.
    """
    words = [item.name, canonical(dict(settings)), str(seed), _sources(item)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _sources(item: Item) -> str:
    digest = hashlib.sha256(metadata.version("lit-resnorm").encode())
    for name in ("lit_resnorm", "lit_resnorm_callbacks"):
        digest.update(_package_digest(name))
    contents = [path.read_bytes() for path in _paper_files(item.run.__module__)]
    for content in sorted(contents):
        digest.update(content)
    return digest.hexdigest()


def _paper_files(name: str) -> set[Path]:
    """Return the files of a module of `papers` and of those whose names it uses."""
    waiting, files, seen = [name], set(), set()
    while waiting:
        module = sys.modules[waiting.pop()]
        seen.add(module.__name__)
        files.add(Path(str(module.__file__)))
        used = {getattr(value, "__module__", None) for value in vars(module).values()}
        waiting += [
            name for name in used - seen if name is not None and name.startswith(PAPERS)
        ]
    return files


@cache
def _package_digest(name: str) -> bytes:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {name}")
    root = Path(spec.origin).parent
    contents = []
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if place.parts[0] not in ("papers", "cli"):
            contents.append(hashlib.sha256(path.read_bytes()).digest())
    # in an order that names of files don't change
    return b"".join(sorted(contents))


class Results:
    """The folder of one item's results under one key.

    Results of another key are kept: the folder is then `<item>-<key>` beside them.

    Args:
        out: Folder of all items.
        item: The item.
        key: See `results_key`.

    Raises:
        OSError: If the folder can't be written.
    """

    def __init__(self, out: Path, item: Item, key: str) -> None:
        self.item = item
        self.folder = out / item.name
        self.beside = self.folder.exists() and _key_of(self.folder) != key
        if self.beside:
            self.folder = out / f"{item.name}-{key[:8]}"
        self._cells = self.folder / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / KEY, key + "\n")

    def finished(self, cell: Cell) -> list[Row] | None:
        """Return a cell's rows where it was finished before."""
        path = self._path(cell)
        if not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))["rows"]

    def finish(self, cell: Cell, rows: Sequence[Row], seconds: float) -> None:
        """Keep a cell's rows."""
        record = {"cell": dict(cell), "rows": list(rows), "seconds": seconds}
        replace_file(self._path(cell), json.dumps(record, default=plain))

    def seconds(self, cells: Iterable[Cell]) -> float:
        """Return the time that the cells took, together."""
        texts = (self._path(cell).read_text(encoding="utf-8") for cell in cells)
        return math.fsum(json.loads(text)["seconds"] for text in texts)

    def _path(self, cell: Cell) -> Path:
        name = hashlib.sha256(canonical(dict(cell)).encode()).hexdigest()[:16]
        return self._cells / f"{name}.json"

    def write(
        self,
        curves: pd.DataFrame,
        figure: Figure,
        checks: Sequence[Check],
        *,
        scale: str,
        settings: Settings,
        seed: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Write curves, figure and verdict; return the verdict."""
        replace_file(self.folder / CURVES, curves.to_csv(index=False))
        with mpl.rc_context({"svg.hashsalt": self.item.name, "svg.fonttype": "none"}):
            figure.savefig(self.folder / "figure.svg", metadata={"Date": None})
            figure.savefig(self.folder / "figure.png", dpi=150)
        verdict = {
            "item": self.item.name,
            "title": self.item.title,
            "source": self.item.source,
            "mark": self.item.mark,
            "scale": scale,
            "passed": outcome(checks),
            "checks": [
                {name: plain(value) for name, value in asdict(check).items()}
                for check in checks
            ],
            "settings": dict(settings),
            "seeds": {"base": seed},
            "versions": installed_versions(*_PACKAGES),
            "commit": _commit(),
            "seconds": round(seconds, 3),
        }
        text = json.dumps(verdict, indent=2, allow_nan=False, ensure_ascii=False)
        replace_file(self.folder / VERDICT, text + "\n")
        return verdict


def _key_of(folder: Path) -> str | None:
    path = folder / KEY
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _commit() -> str | None:
    """Return the commit of the source tree; None where it runs from no repository."""
    folder = Path(__file__).parent
    asked = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        told = subprocess.run(
            asked, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()

"""Puts a comparison, the style sheet and the scripts into one HTML file.

The scripts are plain JavaScript of this package: a drawing library that could do the
same (plotly.js) is 4.5 MB a page. The page's own content security policy names the
script and the style sheet by their hashes and allows nothing else, so that no text
of a run, whatever it holds, can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from lit_resnorm.errors import printable
from lit_resnorm.runs.json_lines import plain, plain_nest, replace_file

SCRIPTS = (
    "document.js",
    "elements.js",
    "numbers.js",
    "choice.js",
    "looks.js",
    "scales.js",
    "paths.js",
    "tables.js",
    "drawing.js",
    "chart.js",
    "findings.js",
    "settings.js",
    "results.js",
    "picker.js",
    "curves.js",
    "panels.js",
    "start.js",
)
"""The scripts in the order in which they need each other."""

PACKED_FROM = 1_000_000
"""Characters of JSON from which on it is deflated."""

# 9 digits give a float32 back to the bit
_DIGITS = 9
_LONG_PARTS = ("series", "group_series", "depth", "spectra")


def write_page(document: Mapping[str, Any], path: Path) -> None:
    """Write a comparison as one HTML file that needs no other and no network.

    Args:
        document: The comparison, as `comparison_document` makes it. Numbers of its
            curves keep nine digits.
        path: The file; its folder is made when needed.

    Raises:
        OSError: If the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page_text(document))


def page_text(document: Mapping[str, Any]) -> str:
    """Return the HTML of a comparison (see :func:`write_page`)."""
    files = resources.files("lit_resnorm.compare.page")
    template, style = (
        files.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css")
    )
    parts = [files.joinpath(name).read_text("utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    data, encoding = _embedded(document)
    return Template(template).substitute(
        title=html.escape(printable(document.get("title") or "Comparison of runs")),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        encoding=encoding,
        data=data,
        findings=_without_script(document),
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _embedded(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return the document as text for a script element, and how it is encoded."""
    short = {
        key: _rounded(value) if key in _LONG_PARTS else plain_nest(value)
        for key, value in document.items()
    }
    # ASCII alone, so that no line separator or lone surrogate comes through
    text = json.dumps(short, allow_nan=False, separators=(",", ":"))
    if len(text) >= PACKED_FROM:
        packed = zlib.compress(text.encode(), level=6)
        return base64.b64encode(packed).decode(), "deflate"
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text, "json"


def _rounded(value: Any) -> Any:
    """Return `value` like `plain_nest`, floats with the digits that the page keeps."""
    if isinstance(value, float):
        return plain(float(f"{value:.{_DIGITS}g}"))
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    return plain_nest(value)


def _without_script(document: Mapping[str, Any]) -> str:
    """Return the findings as list items, for browsers that run no scripts."""
    runs = document.get("runs") or []
    lines = []
    for finding in document.get("findings") or ():
        run = finding.get("run")
        text = str(finding.get("text", ""))
        name = "" if run is None else f"{runs[run]['name']}: "
        said = text if text.startswith(name) else name + text
        lines.append(f"<li>{html.escape(printable(said))}</li>")
    return "\n".join(lines)

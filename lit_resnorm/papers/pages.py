"""Pages of the docs, one a paper, from the results of `lit-resnorm reproduce`.

`python -m lit_resnorm.papers.pages RESULTS docs/papers` writes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_resnorm.papers.catalogue import all_items
from lit_resnorm.papers.item import MARKS, Item
from lit_resnorm.papers.printing import cell_text, checks_held, outcome_word
from lit_resnorm.papers.results import VERDICT

__all__ = ["main", "page", "write_pages"]

TITLES = {
    "furusho2020": (
        "Furusho & Ikeda (2020)",
        "Theoretical analysis of skip connections and batch normalization from "
        "generalization and optimization perspectives. APSIPA Transactions on Signal "
        "and Information Processing 9, e9. doi 10.1017/ATSIP.2020.7",
    ),
    "furusho_sep": (
        "Furusho & Ikeda (2019)",
        "ResNet and batch-normalization improve data separability. ACML 2019, PMLR "
        "101:94-108",
    ),
    "jastrzebski2020": (
        "Jastrzebski et al. (2020)",
        "The break-even point on optimization trajectories of deep neural networks. "
        "ICLR 2020, arXiv 2002.09572",
    ),
    "labatie2019": (
        "Labatie (2019)",
        "Characterizing well-behaved vs. pathological deep neural networks. ICML 2019, "
        "arXiv 1811.03087",
    ),
    "jastrzebski2018": (
        "Jastrzebski et al. (2018)",
        "Residual connections encourage iterative inference. ICLR 2018, arXiv "
        "1710.04773",
    ),
    "arpit2019": (
        "Arpit & Bengio (2019)",
        "The benefits of over-parameterization at initialization in deep ReLU "
        "networks. arXiv 1901.03611",
    ),
}


def write_pages(results: Path, docs: Path) -> list[Path]:
    """Write the page of every paper that has results, and its figures.

    Args:
        results: The `--out` folder of `lit-resnorm reproduce`.
        docs: Where pages go.

    Returns:
        The pages.

    Raises:
        ValueError: If the folder holds no result of any item.
    """
    papers: dict[str, list[tuple[Item, dict[str, Any]]]] = {}
    for item in all_items().values():
        path = results / item.name / VERDICT
        if path.is_file():
            verdict = json.loads(path.read_text(encoding="utf-8"))
            papers.setdefault(item.name.split(".")[0], []).append((item, verdict))
    if not papers:
        raise ValueError(f"{results} holds no {VERDICT} of any item")
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    pages = []
    for paper, judged in papers.items():
        for item, _ in judged:
            drawn = results / item.name / "figure.png"
            shutil.copyfile(drawn, docs / "figures" / f"{item.name}.png")
        path = docs / f"{paper}.md"
        path.write_text(page(paper, judged), encoding="utf-8")
        pages.append(path)
    return pages


def page(paper: str, judged: Sequence[tuple[Item, Mapping[str, Any]]]) -> str:
    """Return a paper's page in Markdown."""
    title, reference = TITLES[paper]
    held = checks_held([verdict for _, verdict in judged], " of ")
    lines = [
        f"# {title}",
        "",
        f"{reference}.",
        "",
        f"{held} items come out as they must. Marks: "
        + "; ".join(f"{mark}, {meaning}" for mark, meaning in MARKS.items())
        + ". Made by `python -m lit_resnorm.papers.pages` from the results of "
        "`lit-resnorm reproduce`, not by hand.",
        "",
        "| item | what it shows | checks | verdict |",
        "|---|---|---|---|",
    ]
    for item, verdict in judged:
        anchor = item.name.replace(".", "")
        lines.append(
            f"| [{item.name}](#{anchor}) | {item.title} | "
            f"{checks_held(verdict['checks'], ' of ')} | {_passed_or_failed(verdict)} |"
        )
    for item, verdict in judged:
        lines += ["", *_section(item, verdict)]
    return "\n".join(lines) + "\n"


def _section(item: Item, verdict: Mapping[str, Any]) -> list[str]:
    versions = verdict["versions"]
    lines = [
        f"## {item.name}",
        "",
        f"**{item.title}** ({_passed_or_failed(verdict)})",
        "",
        f"Source: {item.source}. Mark: {item.mark}, {MARKS[item.mark]}.",
        "",
        f"*The source's claim.* {item.claim}",
        "",
        f"*What differs here, and why.* {item.differs}",
        "",
        *_paragraph("Chosen after results were seen.", item.chosen),
        f"![{item.title}](figures/{item.name}.png)",
        "",
        f"`lit-resnorm reproduce {item.name} --scale {verdict['scale']}`: "
        f"{verdict['seconds']:.0f} s of work, seed {verdict['seeds']['base']}, "
        f"lit-resnorm {versions['lit-resnorm']}, torch {versions['torch']}.",
        "",
        "| check | expected | measured | tolerance | mark | |",
        "|---|---|---|---|---|---|",
    ]
    for check in verdict["checks"]:
        cells = [
            check["name"],
            cell_text(check["expected"]),
            cell_text(check["measured"]),
            cell_text(check["tolerance"]),
            check["mark"],
            outcome_word(check["passed"], "pass", "**fail**"),
        ]
        lines.append(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        )
    if verdict["passed"] is False:
        reason = item.failing or "Not known."
        lines += ["", *_paragraph("Why it fails.", reason)[:-1]]
    return lines


def _paragraph(title: str, text: str) -> list[str]:
    return [f"*{title}* {text}", ""] if text else []


def _passed_or_failed(verdict: Mapping[str, Any]) -> str:
    return outcome_word(verdict["passed"], "passed", "**failed**")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages of the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="--out of lit-resnorm reproduce")
    parser.add_argument("docs", type=Path, help="docs/papers")
    options = parser.parse_args(argv)
    try:
        write_pages(options.results, options.docs)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

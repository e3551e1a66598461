"""One name, one meaning, over both packages."""

import ast
import functools
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "lit_resnorm", ROOT / "callbacks/lit_resnorm_callbacks")

SAME_MEANING = {
    "FURUSHO": "the paper, as a table and as a sentence cite it",
    "LABATIE": "likewise",
    "main": "what a command runs: `lit-resnorm`, and the pages of papers",
    "T": "a type variable",
    "_parser": "the parser of a command's options, which every plain command has",
}
# The parts of a paper's item, which every item has; and its own settings.
OF_ITEMS = {"run", "checks", "figure"}
TELL_NOTHING = (
    *("abreast", "asked", "dual", "judged", "meant", "rehearsal", "telling", "uses"),
    *("common", "helpers", "utils"),
)


@functools.cache
def modules():
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
    ]


def defined(statement):
    """The names that a statement of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign):
        return [statement.target.id] if isinstance(statement.target, ast.Name) else []
    if isinstance(statement, ast.If | ast.Try):
        parts = ast.iter_child_nodes(statement)
        return [name for part in parts for name in defined(part)]
    if isinstance(statement, ast.Assign):
        parts = [part for target in statement.targets for part in ast.walk(target)]
        stored = [p for p in parts if isinstance(p, ast.Name)]
        return [p.id for p in stored if isinstance(p.ctx, ast.Store)]
    return []


def names():
    """By name the modules that define it, constants of papers' items aside."""
    places = defaultdict(list)
    for path, tree in modules():
        of_papers = path.startswith("lit_resnorm/papers/")
        for statement in tree.body:
            for name in defined(statement):
                item = of_papers and (name in OF_ITEMS or name.isupper())
                if not (name.startswith("__") or (item and name[0] != "_")):
                    places[name].append(path)
    return places


def test_no_two_modules_define_a_name_that_means_different_things():
    twice = {
        name: where
        for name, where in names().items()
        if len({*where}) > 1 and name not in SAME_MEANING
    }
    assert not twice


def test_names_that_are_allowed_twice_are_there_twice():
    places = names()
    assert [name for name in SAME_MEANING if len({*places[name]}) < 2] == []


@pytest.mark.parametrize("word", TELL_NOTHING)
def test_no_module_has_a_name_that_tells_nothing_by_itself(word):
    assert word not in {Path(path).stem for path, _ in modules()}

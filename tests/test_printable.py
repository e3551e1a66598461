import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from handmade_runs import losses, make_run
from hostile_runs import record, row, wandb

from lit_resnorm.cli import main
from lit_resnorm.errors import UsageError, one_line, printable
from lit_resnorm.papers.printing import print_table, print_verdict

HARMFUL = {
    "colour": "\x1b[31mred\x1b[0m",
    "title of the window": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;ZWNobyBoaQ==\x07",
    "8-bit commands": "\x9b31m\x9d0;x\x9c",
    "line written over": "good\rbad\x08\x7f",
    "lines": "one\ntwo\vthree\x85four\u2028five",
    "right to left": "exe\u202egnp.doc\u202c",
    "isolates": "\u2066a\u2069\u200f\u200e\u061c",
    "without width": "a\u200bb\ufeffc\u2060d",
    "tags": "a\U000e0041",
    "half a character": "\ud800",
    "NUL": "a\0b",
}
PLAIN = "depth 3, naïve, 深さ, µ ± ∞ ✗ [bold]x[/] \\x1b"


def harmless(text):
    """Say whether a terminal only shows a text, in the order in which it stands."""
    return all(
        one == "\n" or unicodedata.category(one)[0] not in "C" for one in text
    ) and not re.search("[\u2028\u2029]", text)


@pytest.mark.parametrize("name", HARMFUL)
def test_what_terminals_act_upon_is_shown_escaped(name):
    shown = printable(HARMFUL[name])
    assert harmless(shown)
    assert "\n" not in shown
    assert shown.encode().decode("unicode_escape", "surrogatepass") == HARMFUL[name]


def test_plain_text_stays_as_it_is():
    assert printable(PLAIN) == PLAIN
    assert printable(printable("\x1b")) == printable("\x1b") == r"\x1b"


@pytest.mark.parametrize("kind", [UsageError, ValueError, KeyError])
def test_errors_are_lines_that_only_show(kind):
    for text in HARMFUL.values():
        line = one_line(kind(text))
        assert harmless(line)
        assert "\n" not in line


@pytest.mark.parametrize("terminal", [True, False])
def test_compare_prints_names_and_values_of_others_escaped(
    tmp_path, monkeypatch, capsys, terminal
):
    monkeypatch.chdir(tmp_path)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
    for place, text in enumerate(HARMFUL.values()):
        # also bytes that are no text
        encoded = text.replace("\0", "").encode("utf-8", "surrogatepass")
        name = os.fsdecode(encoded).replace("/", "_")
        rows = [*losses(1.0, "NaN"), {"step": 30, f"{text}/loss": "NaN"}]
        path = make_run(tmp_path / "all" / f"{place} {name}", rows, seed=place)
        summary = {
            "status": text,
            "verdicts": {"moments/pathology": text},
            "quantities": {
                "a/b": {"probe": "a", "section": text, "title": text, "headline": True}
            },
        }
        (path / "summary.json").write_text(json.dumps(summary))
        setting = json.dumps({text: text})
        (path / "config.yaml").write_text(f"{setting[:-1]}, 'lr': {place}}}")
        folder = tmp_path / "all" / f"bad {place} {name}"
        make_run(folder, [])
        (folder / "summary.json").write_text(json.dumps({"status": [text]}))
        readable = text.encode("utf-8", "replace").decode()
        items = [row(("a", "NaN")), record("config", (readable, json.dumps(text)))]
        wandb(tmp_path / "all" / f"wandb {place}", items)
    assert main(["compare", "all"]) == 0
    assert r"\x1b[31mred" in harmless_output(capsys)
    assert (tmp_path / "compare.html").read_text()
    assert main(["compare", *(str(p) for p in tmp_path.glob("all/bad*"))]) == 1
    assert r"\u202e" in harmless_output(capsys)


def harmless_output(capsys):
    """Return what was printed in one line, without rich's own colours and cursor."""
    captured = capsys.readouterr()
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.out + captured.err)
    assert harmless(printed.replace("\r", ""))
    return printed.replace("\n", "")


def test_errors_and_tracebacks_show_paths_escaped(capsys, tmp_path):
    bad = "x\x1b[31m\u202e"
    for words in (
        ["compare", bad, bad],
        ["diagnose", "--checkpoint", bad],
        ["diagnose", "--config", bad],
        ["fit", "--config", bad, "--traceback"],
        ["reproduce", bad],
        [bad],
    ):
        assert main(words) in (1, 2)
        error = capsys.readouterr().err
        assert r"\x1b[31m\u202e" in error
        assert harmless(error)


LOUD = """
import logging, sys, warnings
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lit_resnorm.cli.noise import silence_lightning
silence_lightning()
silence_lightning()
rank_zero_info("one\\ntwo \\x1b[31m")
rank_zero_warn("three \\u202e")
warnings.warn("four \\x9b")
"""


def test_what_fit_says_and_warns_of_is_escaped():
    done = subprocess.run(
        [sys.executable, "-c", LOUD], capture_output=True, text=True, check=True
    )
    assert harmless(done.stderr)
    assert "one\ntwo \\x1b[31m\n" in done.stderr
    assert r"three \u202e" in done.stderr
    assert r"four \x9b" in done.stderr


def test_tables_of_items_show_text_escaped(capsys, tmp_path):
    text = "".join(HARMFUL.values())
    print_table([text, "b"], [[text, text]])
    check = dict.fromkeys(("name", "expected", "measured", "tolerance", "mark"), text)
    verdict = {"item": text, "title": text, "passed": True, "seconds": 1.0}
    print_verdict({**verdict, "checks": [{**check, "passed": True}]}, tmp_path / text)
    printed = capsys.readouterr().out
    assert harmless(printed)

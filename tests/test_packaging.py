"""The wheel, and the scripts that the documents show."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = re.findall(
    r"```python\n(.*?)```", (ROOT / "callbacks/README.md").read_text(), re.DOTALL
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_both_packages_typed_and_no_top_level_callbacks(wheel):
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"lit_resnorm", "lit_resnorm_callbacks"}
    for package in top:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names


def test_wheel_holds_every_module_of_both_packages(wheel):
    folders = {
        "lit_resnorm": ROOT / "lit_resnorm",
        "lit_resnorm_callbacks": ROOT / "callbacks" / "lit_resnorm_callbacks",
    }
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            assert (
                f"{package}/{path.relative_to(folder).as_posix()}" in wheel.namelist()
            )


def test_wheel_holds_the_template_the_style_and_the_scripts_of_the_page(wheel):
    folder = ROOT / "lit_resnorm" / "compare" / "page"
    files = [path.name for path in folder.iterdir() if path.is_file()]
    assert {"page.html", "page.css", "start.js"} <= set(files)
    for name in files:
        assert f"lit_resnorm/compare/page/{name}" in wheel.namelist()


def test_wheel_installs_the_command(wheel):
    (entry_points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "lit-resnorm = lit_resnorm.cli:main" in wheel.read(entry_points).decode()


def test_script_of_the_callbacks_readme_prints_a_rate_for_each_relu(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    exec(compile(SCRIPTS[0], "callbacks/README.md", "exec"), {"__name__": "script"})
    printed = capsys.readouterr().out
    assert "activation/rate/001.relu" in printed
    assert "activation/rate/003.relu" in printed


@pytest.mark.parametrize("module", ["lit_resnorm", "lit_resnorm_callbacks"])
def test_imports_do_without_wandb(module):
    block = "import sys; sys.modules['wandb'] = None; "
    command = [sys.executable, "-c", f"{block}import {module}"]
    subprocess.run(command, check=True, cwd=ROOT)


def test_the_contributors_table_has_every_folder_and_loose_module():
    said = (ROOT / "CONTRIBUTING.md").read_text()
    own = ROOT / "lit_resnorm"
    folders = {path.parent for path in own.glob("*/__init__.py")}
    loose = {path for path in own.glob("*.py") if path.name != "__init__.py"}
    for path in folders | loose:
        place = path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        assert f"`{place}`" in said
    allowed = {"errors", "figures", "quantities"}
    assert {path.stem for path in loose} <= allowed

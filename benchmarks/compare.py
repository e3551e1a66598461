"""Seconds that `lit-resnorm compare` takes for many long runs.

    uv run python benchmarks/compare.py --runs 100 --steps 5000

Makes run directories as `fit` leaves them (a training loss at every step, validation
every hundredth, probes by depth every 500 steps) in a folder that is removed at the
end, and compares them: in this process by part, and by the command. Where Chromium and
its driver are installed, the page is opened too: from the start of the navigation until
everything is drawn, and then all runs are drawn in its charts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from lit_resnorm.compare import comparison_document, read_runs
from lit_resnorm.compare.page import write_page

_SITES = 60


def make_run(folder: Path, seed: int, steps: int, depth: int) -> None:
    """Write one run directory."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    init = {"depth": depth, "width": 64, "optimizer": optimizer}
    config = {
        "seed_everything": seed,
        "model": {"class_path": "lit_resnorm.modules.LitResNetBN", "init_args": init},
        "data": {"class_path": "Digits", "init_args": {"batch_size": 64}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "history.jsonl").open("w") as file:
        for step in range(steps + 1):
            rows = [{"train/loss": 2.3 / (1 + step / 50) + 0.1 * draw.random()}]
            if step % 100 == 0:
                rows.append(
                    {key: draw.random() for key in ("val/loss", "val/accuracy")}
                )
            if step % 500 == 0:
                names = ("activation/rate", "activation/dead", "moments/effective_rank")
                sites = [f"{i:03d}.net.blocks.{i}.act" for i in range(_SITES)]
                rows.append({f"{n}/{s}": draw.random() for n in names for s in sites})
                rows.append({"fim/lambda_max": draw.random(), "moments/pathology": 0.0})
            for row in rows:
                file.write(json.dumps({"step": step, "epoch": 0, **row}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))


def open_page(page: Path) -> dict[str, float]:
    """Return the seconds that Chromium takes for the page; none without one."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        return {}
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as chromium:
        chromium.set_window_size(1400, 1000)
        chromium.get(page.as_uri() + "#show=runs")
        marked = "return performance.getEntriesByName('ready')[0]?.startTime"
        while (opened := chromium.execute_script(marked)) is None:
            time.sleep(0.01)
        drawn = chromium.execute_script(
            "const start = performance.now();"
            "document.querySelector('#picker .buttons button').click();"
            "document.body.getBoundingClientRect();"
            "return performance.now() - start"
        )
    return {"opening the page": opened / 1000, "drawing all runs": drawn / 1000}


def main() -> None:
    """Make the runs and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.runs):
            folder = Path(root) / "runs" / f"run-{number:03d}"
            make_run(folder, number, options.steps, depth=10 * (1 + number % 10))
        page = Path(root) / "compare.html"
        times = [time.perf_counter()]
        runs, skipped = read_runs([str(Path(root) / "runs")])
        times.append(time.perf_counter())
        document = comparison_document(runs, skipped)
        times.append(time.perf_counter())
        write_page(document, page)
        times.append(time.perf_counter())
        command = "import sys; from lit_resnorm.cli import main; sys.exit(main())"
        words = ["compare", str(Path(root) / "runs"), "--out", str(page)]
        subprocess.run(
            [sys.executable, "-c", command, *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times.append(time.perf_counter())
        size = page.stat().st_size / 2**20
        opened = open_page(page)
    parts = ("reading", "comparing", "writing the page", "the whole command")
    print(f"{options.runs} runs of {options.steps} steps; page {size:.1f} MiB")
    for part, start, end in zip(parts, times, times[1:], strict=False):
        print(f"{part:>18}: {end - start:5.2f} s")
    for part, seconds in opened.items():
        print(f"{part:>18}: {seconds:5.2f} s")


if __name__ == "__main__":
    main()

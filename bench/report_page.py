"""The pages of `rank` and `mislabels` in a browser: bytes, time to load, and the pictures of them in the README.

    .venv/bin/python bench/report_page.py build/demo --pictures docs

Opens each page from disk with the network off, in a fresh profile each time. Needs Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from playwright.sync_api import Browser, sync_playwright

OPENED = 7
# By name: the words of the command, and what is scrolled to before the picture is taken.
PAGES = {
    "rank": (("rank", "24", "--top", "5"), ".bar"),
    "mislabels": (("mislabels", "--top", "12"), ".bar"),
    "mislabels of 200": (("mislabels", "--top", "200"), ""),
}


def main() -> None:
    """Write the pages of a demo project, open them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, help="a demo project; made where it is missing")
    parser.add_argument("--pictures", type=Path, help="a folder for rank.png and mislabels.png")
    given = parser.parse_args()
    if not given.project.is_dir():
        influence("demo", str(given.project), cwd=Path())
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is needed (Debian: apt-get install chromium)")
    print(f"| page | images | MB | to load, ms (median of {OPENED}) |\n|---|---|---|---|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (words, part) in PAGES.items():
            path = given.project.resolve() / f"{name.replace(' ', '-')}.html"
            influence(*words, "--report", str(path), "--format", "csv", "-q", cwd=given.project)
            images, seconds = load(browser, path)
            size = path.stat().st_size / 1e6
            print(f"| {name} | {images:,} | {size:.2f} | {1000 * seconds:.0f} |", flush=True)
            if given.pictures is not None and "of" not in name:
                picture(browser, path, part, given.pictures / f"{name}.png")
        browser.close()


def influence(*words: str, cwd: Path) -> None:
    """Run the command, its rows discarded."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    subprocess.run(
        [sys.executable, "-m", "influence_cli", *words], cwd=cwd, env=environment, stdout=subprocess.DEVNULL, check=True
    )


def load(browser: Browser, path: Path) -> tuple[int, float]:
    """Count the images of a page, and measure the seconds until it is loaded, every image decoded."""
    seconds = []
    images = 0
    for _ in range(OPENED):
        context = browser.new_context(offline=True, viewport={"width": 1010, "height": 1090})
        tab = context.new_page()
        tab.goto(path.as_uri())
        milliseconds, images = tab.evaluate(
            "async () => { const all = [...document.images].filter((image) => image.src);"
            "await Promise.all(all.map((image) => image.decode()));"
            "return [performance.now(), all.length]; }"
        )
        seconds.append(milliseconds / 1000)
        context.close()
    return images, median(seconds)


def picture(browser: Browser, path: Path, part: str, file: Path) -> None:
    """Take a picture of a page from some part on."""
    context = browser.new_context(offline=True, viewport={"width": 1010, "height": 1090}, color_scheme="light")
    tab = context.new_page()
    tab.goto(path.as_uri())
    if part:
        tab.locator(part).first.evaluate("element => element.scrollIntoView()")
        # Some decisions taken, so that the desk shows what it is for.
        for key in ("k", "r", "r", "d", "r"):
            tab.keyboard.press(key)
    tab.screenshot(path=file)
    context.close()


if __name__ == "__main__":
    main()

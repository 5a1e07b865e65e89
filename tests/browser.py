"""A headless Chromium for tests, by playwright. Draws the upper part of a report for README.md:

python tests/browser.py runs/demo/report.html data/results/demo/report.png
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


if __name__ == "__main__":
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(Path(sys.argv[1]).resolve().as_uri())
        end = page.locator("#length").bounding_box()["y"]  # down to its second figure
        page.screenshot(path=sys.argv[2], full_page=True, clip={"x": 0, "y": 0, "width": 1200, "height": end})

"""Takes the picture of a report that the pages show: the upper part of the page, in headless Chromium.

    ncprior demo
    python examples/pictures/report.py ncprior-demo/report.html examples/images/report.png

Needs Chromium, or Chrome.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from small import save_small

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")


def take(page: Path, path: Path, *, width: int = 1000, height: int = 1290) -> None:
    """Writes what a window of a size in pixels shows of a page."""
    browser = next((found for found in map(shutil.which, BROWSERS) if found is not None), None)
    if browser is None:
        raise SystemExit("Chromium was not found. Install it: apt install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch, "shot.png")
        options = [f"--window-size={width},{height}", f"--user-data-dir={scratch}/user"]
        command = [browser, *OPTIONS, *options, f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        save_small(Image.open(shot), path)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("page", type=Path, help="the HTML file")
    options.add_argument("out", type=Path, help="the PNG")
    chosen = options.parse_args()
    take(chosen.page, chosen.out)


if __name__ == "__main__":
    main()

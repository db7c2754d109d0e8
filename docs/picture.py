"""The picture of a report for the README: headless Chromium, light, fewer than 200 KB.

    make round METHOD=less RUN=quickstart-less
    python docs/picture.py runs/quickstart-less

Writes the run's report and, of its top, docs/images/report.png with few colours. Needs Debian's chromium (or
another Chromium on the path), and playwright and pillow, which `make setup` installs.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from dataflex_pipeline.reports.page.report import write_report
from dataflex_pipeline.reports.records import RunRecord

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1160, 860
COLORS = 64
MOST_BYTES = 200_000


def shot(page_file: Path) -> Image.Image:
    """Return the top of a page as it looks in a browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("There is no chromium here (Debian: apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=90_000)
        taken = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(taken)).convert("RGB")


def main() -> None:
    """Write the report of a run, and its picture."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord.read(Path(sys.argv[1]))
        page_file = write_report(record, Path(folder) / "report.html")
        picture = shot(page_file).quantize(COLORS, dither=Image.Dither.NONE)
    PICTURE.parent.mkdir(exist_ok=True)
    picture.save(PICTURE, optimize=True)
    if PICTURE.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{PICTURE} has {PICTURE.stat().st_size:,} bytes; a README takes {MOST_BYTES:,}.")


if __name__ == "__main__":
    main()

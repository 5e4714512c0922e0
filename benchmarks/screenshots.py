"""Screenshots of report pages in Chromium: 1,200 pixels and a phone's 390, light and dark.

    python benchmarks/screenshots.py runs/a --out shots        # a folder of hpt train or hpt compare

Needs `chromium` on the path.  A window narrower than 500 pixels is refused by it, so the phone's is a frame in a page.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from hybrid_predict_trainer.experiments.report.page import write_report

WIDTHS = {"wide": 1200, "phone": 390}
SCHEMES = {"light": 1, "dark": 0}
FRAME = '<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>'


def shoot(page: Path, out: Path, width: int, height: int, scheme: int) -> None:
    """One picture.

    Args:
        page: HTML file.
        out: PNG file.
        width: Of the page, in pixels.
        height: Of the picture.
        scheme: Blink's number of a colour scheme.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("screenshots need chromium on the path")
    with tempfile.TemporaryDirectory() as folder:
        target = page
        if width < 500:
            target = Path(folder) / "frame.html"
            target.write_text(FRAME.format(page=page.resolve().as_uri(), width=width, height=height), encoding="utf-8")
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--hide-scrollbars", f"--user-data-dir={folder}/profile", f"--screenshot={out.resolve()}",
             f"--window-size={max(width, 500)},{height}", f"--blink-settings=preferredColorScheme={scheme}",
             target.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def main() -> None:
    """Write the page and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("shots"))
    parser.add_argument("--height", type=int, default=2600)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    page = write_report(args.run)
    for name, width in WIDTHS.items():
        for scheme, number in SCHEMES.items():
            shoot(page, args.out / f"{name}-{scheme}.png", width, args.height, number)
            print(args.out / f"{name}-{scheme}.png")


if __name__ == "__main__":
    main()

"""Pictures of what people see, from a short comparison made for them: `make screenshots` (Chromium, two minutes).

docs/images/report-light.png, report-dark.png, report-phone.png: the page of a comparison, as a browser shows it.
docs/images/watch.svg: `hpt watch` as a terminal shows it.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from hybrid_predict_trainer.cli import hpt
from hybrid_predict_trainer.cli.watch import panel, view

IMAGES = Path(__file__).parents[1] / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Name, width and height of the window in pixels, and Chromium's number of the preferred colours (0: dark, 1: light).
SHOTS = (("report-light", 1200, 1320, 1), ("report-dark", 1200, 1320, 0), ("report-phone", 500, 1000, 1))
COMPARE = ("compare", "--task", "pinn-poisson", "--steps", "600", "--seeds", "3", "--budgets", "0.5,2", "--overwrite")


def main() -> int:
    """Make what the pictures are of, and take them."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"no browser: install one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "poisson"
        if hpt.main([*COMPARE, "--out", str(out)]):
            return 1
        for name, width, height, colours in SHOTS:
            target = IMAGES / f"{name}.png"
            subprocess.run(
                [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={colours}",
                 f"--screenshot={target}", (out / "report.html").as_uri()],
                check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
            print(target.name)
        run = next(path.parent for path in sorted(out.glob("runs/**/metrics.jsonl")) if "hybrid" in path.parent.name)
        console = Console(record=True, width=96, file=io.StringIO())
        console.print(panel(view(run), "poisson"))
        drawn = console.export_svg(title="hpt watch", clear=False)
        # a picture in the docs fetches nothing: the reader's own monospace font will do
        (IMAGES / "watch.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.S), encoding="utf-8")
        print("watch.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

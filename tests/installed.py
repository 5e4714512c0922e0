"""Builds wheel and sdist in a temporary folder and tries the wheel in an environment of its own: `make installed`.

The environment is empty but for a path to the site-packages that have torch; what the wheel lacks is missing there, and
nothing of that folder is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What has to be in both, beside the modules.
DATA = ("py.typed", "config/preset_files/debug.toml", "forecast/priors.json", "experiments/report/templates/page.html")


def run(*command: str, cwd: Path) -> str:
    """Output of a command; its errors where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of the tree."""
    tree = folder / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "tests", "results", "__pycache__", "*.egg-info")
    )
    for kind in ("sdist", "wheel"):
        ask = f"import sys; from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        run(sys.executable, "-c", ask, cwd=tree)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = built(folder)
        with zipfile.ZipFile(wheel) as a, tarfile.open(sdist) as b:
            inside = {"wheel": a.namelist(), "sdist": b.getnames()}
        for kind, names in inside.items():
            missing = [data for data in DATA if not any(n.endswith(f"hybrid_predict_trainer/{data}") for n in names)]
            if missing:
                raise SystemExit(f"the {kind} lacks {', '.join(missing)}")
        venv.create(folder / "env", with_pip=False)
        python = folder / "env" / "bin" / "python"
        site = Path(
            run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        )
        run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
            str(wheel), cwd=folder)  # fmt: skip
        (site / "torch_of_another.pth").write_text(sysconfig.get_path("purelib") + "\n")
        hpt = str(folder / "env" / "bin" / "hpt")
        version = run(hpt, "--version", cwd=folder).strip()
        where = run(str(python), "-c", "import hybrid_predict_trainer as h; print(h.__file__)", cwd=folder).strip()
        if not where.startswith(str(site)):
            raise SystemExit(f"the package came from {where}, not from the wheel")
        said = run(hpt, "train", "--preset", "debug", "--threads", "1", "--out", str(folder / "run"), cwd=folder)
        size = sum(path.stat().st_size for path in (site / "hybrid_predict_trainer").rglob("*.py"))
        print(f"{version} from {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB of sources)")
        print(said.strip())


if __name__ == "__main__":
    main()

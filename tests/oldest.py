"""The oldest versions that pyproject.toml allows, as requirements of pip: ``python tests/oldest.py NAME ...``.

A name is an extra's or a requirement's.  Prints a line for each requirement of the package itself and of what is
named, ``>=`` turned into ``==``.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def oldest(names: list[str]) -> list[str]:
    """Requirements, sorted.

    Raises:
        KeyError: a name is neither an extra's nor a requirement's.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = {name: [line for line in lines if ">=" in line and "[" not in line.split(">=")[0]]
              for name, lines in project["optional-dependencies"].items()}  # fmt: skip
    alone = {line.split(">=")[0]: [line] for lines in extras.values() for line in lines}
    wanted = {line for name in names for line in {**alone, **extras}[name]}
    return sorted(line.replace(">=", "==") for line in wanted | set(project["dependencies"]))


if __name__ == "__main__":
    print("\n".join(oldest(sys.argv[1:])))

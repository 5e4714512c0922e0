"""Optional libraries, asked for before a run begins and not when its results are due."""

from __future__ import annotations

import importlib.util

from ..tasks.base import missing_extra

#: Module -> the extra that installs it.
EXTRAS = {"filelock": "cli", "jinja2": "cli", "tqdm": "cli", "matplotlib": "report", "scipy": "experiments",
          "rich": "watch", "optuna": "sweep", "pyarrow": "parquet"}  # fmt: skip


def require(*modules: str) -> None:
    """Refuse to begin without libraries that will be needed.

    Args:
        modules: Keys of :data:`EXTRAS`.

    Raises:
        ModuleNotFoundError: one is not installed; the message is one line with the command that installs it.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise missing_extra(name, EXTRAS[name])

"""Two builds of the package in one process, one after the other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PACKAGE = "hybrid_predict_trainer"
PRESENT = Path(__file__).resolve().parents[2]


def _loaded(package: str) -> list[str]:
    return [name for name in sys.modules if name == package or name.startswith(f"{package}.")]


@contextmanager
def build(root: Path, package: str = PACKAGE) -> Iterator[ModuleType]:
    """The package as ``root/src`` has it, imported anew; afterwards ``sys.modules`` is what it was before.

    Raises:
        SystemExit: ``root`` is no checkout of the package.
    """
    source = root.resolve() / "src"
    if not (source / package / "__init__.py").is_file():
        raise SystemExit(f"{root} is no checkout: {source / package} is missing")
    before = {name: sys.modules.pop(name) for name in _loaded(package)}
    sys.path.insert(0, str(source))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(package)
        if not Path(str(module.__file__)).is_relative_to(source):
            raise SystemExit(f"{package} was loaded from {module.__file__}, not from {source}")
        yield module
    finally:
        sys.path.remove(str(source))
        for name in _loaded(package):
            del sys.modules[name]
        sys.modules.update(before)

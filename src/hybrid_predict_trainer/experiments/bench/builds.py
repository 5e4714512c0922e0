"""Another checkout of this package, loaded beside the present one, so that both can be measured by turns.

Modules of the two never mix: while a build is used ``sys.modules`` names its modules alone, so that what it imports
late is its own as well.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.partition(".")[0]


class Build:
    """The package as it is loaded now, or as a checkout has it."""

    def __init__(self, root: Path | None = None) -> None:
        """Load a checkout.

        Args:
            root: Folder that holds ``src``; None: the package that this code belongs to.

        Raises:
            ValueError: ``root`` is no checkout of the package.
        """
        self._source = None if root is None else root.resolve() / "src"
        if self._source is not None and not (self._source / PACKAGE / "__init__.py").is_file():
            raise ValueError(f"{root} is no checkout of an earlier build: {self._source / PACKAGE} is missing")
        self._modules: dict[str, ModuleType] = {}
        with self.used() as module:
            self.package = module

    @contextmanager
    def used(self) -> Iterator[ModuleType]:
        """While its code runs."""
        if self._source is None:
            yield sys.modules[PACKAGE]
            return
        before = {name: sys.modules.pop(name) for name in _loaded()}
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self._source))
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(PACKAGE)
        finally:
            sys.path.remove(str(self._source))
            self._modules = {name: sys.modules.pop(name) for name in _loaded()}
            sys.modules.update(before)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]

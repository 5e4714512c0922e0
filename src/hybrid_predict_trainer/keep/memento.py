"""Attributes of objects as they were, for what must leave no trace when it fails or is interrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

#: What an attribute holds that is changed in place.
_CONTAINERS = frozenset({list, dict, set, deque, np.ndarray})


class Memento:
    """Attributes of objects as they were: containers and arrays by content, everything else by reference.

    Tensors that are written in place are not among what it can bring back.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        """Remember; a few microseconds an object, because every proposal does it.

        Args:
            objects: With a ``__dict__`` or dataclass slots; None is passed over.
        """
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        for held in objects:
            if held is None:
                continue
            live = getattr(held, "__dict__", None)
            if live is not None:
                kept = live.copy()
                self._attributes.append((live, kept))
            else:
                kept = {name: getattr(held, name) for name in held.__slots__}
                self._slots.append((held, kept))
            self._contents += [(value, value.copy()) for value in kept.values() if type(value) in _CONTAINERS]

    def restore(self) -> None:
        """Every attribute as it was; may be called any number of times."""
        for live, kept in self._attributes:
            live.update(kept)
        for holder, kept in self._slots:
            for name, value in kept.items():
                setattr(holder, name, value)
        for value, content in self._contents:
            _refill(value, content)


def _refill(live: Any, content: Any) -> None:
    if isinstance(live, np.ndarray):
        live[...] = content
        return
    live.clear()
    (live.update if isinstance(live, dict | set) else live.extend)(content)

"""Methods of a framework's objects that are called through us for as long as the engine rides along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_NOTHING = object()


class Replaced:
    """Attributes of single objects, put in the place of their methods, and put back."""

    def __init__(self) -> None:
        """Nothing is replaced yet."""
        self._before: list[tuple[object, str, Any]] = []

    def wrap(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(method, *args, **kwargs)`` where ``owner.name(*args, **kwargs)`` is called.

        Args:
            owner: An object, not a class: others of its class are left alone.
            name: Of a method.
            around: Gets the bound method as it was.
        """
        method = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs)

        self.put(owner, name, called)

    def put(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute of the object itself."""
        self._before.append((owner, name, vars(owner).get(name, _NOTHING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Everything is as it was before; the last change is undone first."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

"""The modules of a model, one after the other, for what looks at all of them at every step.

``Module.modules`` is a generator inside of a generator for every level: on a small model going through them takes as
long as one of its layers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``list(model.modules())`` is: every module once, each before those inside of it.

    Args:
        model: A class of which that lists its modules in a way of its own is asked.
    """
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        kind: Any = type(module)
        if not _lists_as_usual(kind):
            return list(model.modules())
        found[module] = None
        if module._modules:
            waiting += [inner for inner in reversed(module._modules.values()) if inner is not None]
    return list(found)


@lru_cache(maxsize=1024)
def _lists_as_usual(kind: Any) -> bool:
    return bool(kind.named_modules is nn.Module.named_modules and kind.modules is nn.Module.modules)

"""What to say where an optional library is not installed."""

from __future__ import annotations


def missing_extra(module: str, extra: str) -> ModuleNotFoundError:
    """Return the one-line error for an optional library that is not installed."""
    return ModuleNotFoundError(
        f'{module!r} is not installed; run: pip install "hybrid-predict-trainer[{extra}]"', name=module
    )

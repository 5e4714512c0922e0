"""The validation protocol: experiments with criteria, each beside the control that shows whether it means anything."""

from __future__ import annotations

__all__: list[str] = []

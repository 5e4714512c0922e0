"""What the forecast of a run's final loss is worth: recorded runs, curves of others, and the scores on both."""

from __future__ import annotations

__all__: list[str] = []

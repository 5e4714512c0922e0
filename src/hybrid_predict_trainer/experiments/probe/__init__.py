"""What prediction would be worth on somebody's own model and data: short pilots, before a long run is begun."""

from __future__ import annotations

__all__: list[str] = []

"""What a trained language model can do besides its loss: minimal pairs in-process, harness tasks in a process apart."""

from __future__ import annotations

__all__: list[str] = []

"""What the site does to the documents: links that leave `docs/` (sources, LOG.md) become names, as in a book."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite the links of one page."""
    return _OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    return link[1] if link[2].rstrip("/") in link[1] else f"{link[1]} ({link[2]})"

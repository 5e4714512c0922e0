"""The page's HTML and style sheets, as jinja2 templates.

`page.html` (the whole, with `page.css` and `charts.css`), `parts.html` (macros: table, figure, legend, ...).
Everything is escaped unless the template marks it as ready HTML.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...extras import require

if TYPE_CHECKING:
    from jinja2 import Environment


def printable(value: object, limit: int = 400) -> str:
    """Text of any value: printable characters only, cut at ``limit``."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


@functools.cache
def environment() -> Environment:
    """The templates of this folder.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    require("jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader(__name__, package_path=""), autoescape=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    found.filters["printable"] = printable
    return found


def macro(name: str, *arguments: object) -> str:
    """HTML of a macro of ``parts.html``."""
    return str(getattr(environment().get_template("parts.html").module, name)(*arguments))


def whole_page(title: str, sections: Sequence[str]) -> str:
    """A self-contained page, which loads nothing and runs no script.

    Args:
        title: As text.
        sections: As HTML.
    """
    return environment().get_template("page.html").render(title=title, sections=sections)

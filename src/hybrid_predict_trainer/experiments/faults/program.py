"""All cases of the fault table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import files, processes, surroundings, training
from .table import Case, run_table


def all_cases() -> list[Case]:
    """In the order of the table."""
    return [*processes.cases(), *files.cases(), *training.cases(), *surroundings.cases()]


def run(
    *, quick: bool, seed: int, times: int = 1, only: Sequence[str] = (), note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The table, short or long; see :func:`.table.run_table`.

    Raises:
        ConfigError: a name is that of no case.
    """
    return run_table(all_cases(), quick=quick, times=times, seed=seed, only=only, note=note)

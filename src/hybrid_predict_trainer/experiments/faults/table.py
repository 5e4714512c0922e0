"""A table of faults: every case is tried with several seeds, and a try that is not survived is lost."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import write_between
from ..report.text import aligned

#: One try: (seed, an empty folder) -> None if it was survived, else what went wrong.
Trial = Callable[[int, Path], str | None]

HEAD = ("case", "tries", "survived", "lost")
#: What a lost try says, at most.
MAX_WORDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault.

    Attributes:
        name: For people.
        survived: What has to come of it.
        trial: Puts it to the product once.
        tries: How often, in the long table.
        quick: How often in the short one; 0: not at all.
    """

    name: str
    survived: str
    trial: Trial
    tries: int
    quick: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a case."""

    case: str
    survived_means: str
    tries: int
    survived: int
    failures: tuple[str, ...]

    @property
    def lost(self) -> int:
        """Tries that were not survived."""
        return self.tries - self.survived


def attempt(case: Case, seed: int) -> str | None:
    """One try in a folder of its own; whatever it raises is a loss.

    Args:
        case: Which.
        seed: Of everything random in it.

    Returns:
        None if it was survived, else what went wrong, in a line.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said is part of what a case looks at, not of the table
        try:
            found = case.trial(seed, Path(folder))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
    return None if found is None else f"seed {seed}: {' '.join(found.split())[:MAX_WORDS]}"


def run_table(
    cases: Sequence[Case], *, quick: bool = False, times: int = 1, seed: int = 0, only: Iterable[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Try all cases.

    Args:
        cases: In the order of the table.
        quick: As many tries as the short table has.
        times: As many tries, so many times.
        seed: Of the first try of every case.
        only: Names, or parts of names; empty: all.
        note: Told a line per case.

    Returns:
        ``rows``, the sums ``tries``, ``survived``, ``lost``, and ``passed``: nothing was lost.

    Raises:
        ConfigError: a name is that of no case.
    """
    wanted = list(only)
    for name in wanted:
        if not any(name in case.name for case in cases):
            raise ConfigError(f"no case {name!r}: there are {', '.join(case.name for case in cases)}")
    rows = []
    for case in cases:
        tries = times * (case.quick if quick else case.tries)
        if not tries or (wanted and not any(name in case.name for name in wanted)):
            continue
        found = [attempt(case, seed + i) for i in range(tries)]
        failures = tuple(f for f in found if f is not None)
        rows.append(Row(case.name, case.survived, tries, tries - len(failures), failures))
        note(f"{case.name}: {rows[-1].survived} of {tries}" + "".join(f"\n  {f}" for f in failures[:3]))
    tries, survived = sum(r.tries for r in rows), sum(r.survived for r in rows)
    return {
        "rows": [
            {
                "case": r.case, "expected": r.survived_means, "tries": r.tries, "survived": r.survived,
                "lost": r.lost, "failures": list(r.failures),
            }
            for r in rows
        ],
        "tries": tries, "survived": survived, "lost": tries - survived, "passed": tries == survived,
    }  # fmt: skip


def format_text(found: dict[str, Any]) -> str:
    """The table for a terminal, and what was lost."""
    rows = [[str(row[key]) for key in HEAD] for row in found["rows"]]
    rows.append(["all", *(str(found[key]) for key in HEAD[1:])])
    lost = [f"{row['case']}: {failure}" for row in found["rows"] for failure in row["failures"]]
    return "\n".join([*aligned(HEAD, rows), *([""] if lost else []), *lost])


def markdown(found: dict[str, Any]) -> str:
    """The table for a document."""
    lines = ["| case | survived means | tries | survived | lost |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['case']} | {r['expected']} | {r['tries']} | {r['survived']} | {r['lost']} |" for r in found["rows"]
    ]
    lines.append(f"| **all** | | {found['tries']} | {found['survived']} | {found['lost']} |")
    return "\n".join(lines) + "\n"


def write_markdown(path: Path, found: dict[str, Any]) -> None:
    """Write the table: between its marks where a document has them, else alone.

    Raises:
        OSError: it cannot be written.
    """
    write_between(path, "faults", markdown(found))

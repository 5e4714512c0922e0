"""Tables of README and docs/benchmarks.md from results of `hpt bench regimes`: a line per case, to be pasted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..report.data import Record, list_of, number, table_of
from .cells import BOUNDS, DASH, loss_cell, s_cell

#: Of the README; the last column is written by hand.
SHORT_HEAD = ("task", "plain ends at", "ours ends at", "speed-up by cost [95 %]", "by wall-clock [95 %]", "n",
              "leave it off when")  # fmt: skip
#: Of docs/benchmarks.md.
HEAD = ("task", "`hpt bench regimes --regime` ...", "n", "plain, final", "hybrid, final", "S by cost [95 %, t]",
        "best peer, weights only", "by hand: long / block warm-up")  # fmt: skip

#: Controls that a better recipe would give as well, no competitors.
BY_HAND = ("long-warmup", "block-warmup")


def lines(results: Sequence[Record]) -> list[str]:
    """Markdown lines for docs/benchmarks.md; a case without a hybrid arm has none."""
    return _table(HEAD, line, results)


def short_lines(results: Sequence[Record]) -> list[str]:
    """Markdown lines for the README; a case without a hybrid arm has none."""
    return _table(SHORT_HEAD, short_line, results)


def _table(
    head: Sequence[str], row_of: Callable[[Record, Record], tuple[str, ...] | None], results: Sequence[Record]
) -> list[str]:
    rows = [row for result in results for case in list_of(result.get("cases")) if (row := row_of(result, case))]
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def line(result: Record, case: Record) -> tuple[str, ...] | None:
    """Cells of a case for docs/benchmarks.md."""
    name, arms = str(case.get("case")), arms_of(result, case)
    hybrid = hybrid_of(arms)
    if hybrid is None:
        return None
    by_name = {str(r.get("arm")): r for r in reversed(arms)}
    peers = [r for r in arms if r.get("weights_only") and number(r.get("S")) is not None and r is not hybrid]
    best = max(peers, key=lambda r: number(r.get("S")) or 0.0, default=None)
    hand = [short(by_name[arm]) if arm in by_name else DASH for arm in BY_HAND]
    return (
        task_words(case),
        f"`{result.get('regime')} --case {name}`",
        seeds_cell(hybrid),
        loss_cell(plain_of(arms)),
        loss_cell(hybrid),
        bold(s_cell(hybrid)),
        DASH if best is None else f"{best.get('arm')} {short(best)}",
        DASH if set(hand) == {DASH} else " / ".join(hand),
    )


def short_line(result: Record, case: Record) -> tuple[str, ...] | None:
    """Cells of a case for the README."""
    arms = arms_of(result, case)
    hybrid = hybrid_of(arms)
    if hybrid is None:
        return None
    return (
        task_words(case),
        loss_cell(plain_of(arms)),
        loss_cell(hybrid),
        bold(s_cell(hybrid)),
        s_cell(hybrid, "S_wall"),
        seeds_cell(hybrid),
        "",
    )


def arms_of(result: Record, case: Record) -> list[Record]:
    """Arms of a case."""
    return [r for r in list_of(result.get("arms")) if isinstance(r, Mapping) and r.get("case") == str(case.get("case"))]


def hybrid_of(arms: Sequence[Record]) -> Record | None:
    """The first hybrid arm with the default predictor."""
    return next((r for r in arms if r.get("arm") == "hybrid"), None)


def plain_of(arms: Sequence[Record]) -> Record:
    """The plain arm at equal cost; empty if there is none."""
    return next((r for r in arms if r.get("kind_of_arm") == "plain" and r.get("budget") == 1.0), {})


def task_words(case: Record) -> str:
    """Task, case and length."""
    task, steps = table_of(case.get("task")).get("task", "?"), number(case.get("steps"))
    return f"{task}, {case.get('case')}" + ("" if steps is None else f", {steps:,.0f} steps")


def seeds_cell(row: Record) -> str:
    """Number of seeds."""
    count = number(row.get("n"))
    return DASH if count is None else f"{count:.0f}"


def short(row: Record) -> str:
    """S with its bound, without the interval."""
    value = number(row.get("S"))
    return DASH if value is None else f"{BOUNDS.get(str(row.get('kind')), '')}{value:.3g}"


def bold(cell: str) -> str:
    """The figure of ``≥ 3.03 [2.55, ∞)`` in bold."""
    words = cell.split(" ", 2)
    at = 1 if words[0] in {b.strip() for b in BOUNDS.values()} else 0
    if cell == DASH or at >= len(words):
        return cell
    words[at] = f"**{words[at]}**"
    return " ".join(words)


def _row(items: Sequence[str]) -> str:
    return f"| {' | '.join(item.replace('|', '/') for item in items)} |"

"""The table of the README from results of `hpt bench regimes`: a line per case, to be pasted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report.data import Record, list_of, number, table_of
from .cells import BOUNDS, DASH, loss_cell, s_cell

HEAD = ("task", "`hpt bench regimes --regime` ...", "n", "plain, final", "hybrid, final", "S by cost [95 %, t]",
        "best peer, weights only", "by hand: long / block warm-up")  # fmt: skip

#: Controls that a better recipe would give as well, no competitors.
BY_HAND = ("long-warmup", "block-warmup")


def lines(results: Sequence[Record]) -> list[str]:
    """Markdown lines; a case without a hybrid arm has none."""
    rows = [row for result in results for case in list_of(result.get("cases")) if (row := line(result, case))]
    return [_row(HEAD), _row(["---"] * len(HEAD)), *map(_row, rows)]


def line(result: Record, case: Record) -> tuple[str, ...] | None:
    """Cells of a case."""
    name, regime = str(case.get("case")), str(result.get("regime"))
    arms = [r for r in list_of(result.get("arms")) if isinstance(r, Mapping) and r.get("case") == name]
    by_name = {str(r.get("arm")): r for r in reversed(arms)}
    hybrid = by_name.get("hybrid")
    if hybrid is None:
        return None
    plain = next((r for r in arms if r.get("kind_of_arm") == "plain" and r.get("budget") == 1.0), {})
    peers = [r for r in arms if r.get("weights_only") and number(r.get("S")) is not None and r is not hybrid]
    best = max(peers, key=lambda r: number(r.get("S")) or 0.0, default=None)
    hand = [short(by_name[arm]) if arm in by_name else DASH for arm in BY_HAND]
    task, steps = table_of(case.get("task")).get("task", "?"), number(case.get("steps"))
    count = number(hybrid.get("n"))
    return (
        f"{task}, {name}" + ("" if steps is None else f", {steps:,.0f} steps"),
        f"`{regime} --case {name}`",
        DASH if count is None else f"{count:.0f}",
        loss_cell(plain),
        loss_cell(hybrid),
        bold(s_cell(hybrid)),
        DASH if best is None else f"{best.get('arm')} {short(best)}",
        DASH if set(hand) == {DASH} else " / ".join(hand),
    )


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

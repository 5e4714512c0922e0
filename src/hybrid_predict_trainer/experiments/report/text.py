"""A comparison as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..run_arm import in_steps
from ..statistics import ends_words

HEAD = ("arm", "final val loss", "cost, steps", "wall s", "forward", "backward", "jumps", "lr")


def comparison(result: Mapping[str, Any]) -> str:
    """Table of arms, the equal-loss figure with its interval, the gap at equal cost, the verdict."""
    rows = [_row(arm) for arm in result["arms"]]
    count = len(result["seeds"])
    lines = [f"{result['task']}, {count} seed{'s' if count > 1 else ''}: mean over seeds", "", *aligned(HEAD, rows), ""]
    value, reason = result["speedup_at_equal_loss"], result["speedup_reason"]
    told = "unknown" if value is None else f"{value:.3f}x  {_interval(result['ci95'])}"
    lines.append(f"speed-up at equal loss  {told}{f'  ({reason})' if reason else ''}")
    wall = result["speedup_wall"]
    lines.append(f"  the same in wall time {'unknown' if wall is None else f'{wall:.3f}x'}")
    lines.append(
        f"loss gap at equal cost  {_percent(result['loss_gap_at_equal_cost_pct'])}  (below 0: hybrid is lower)"
    )
    lines.append(f"jump of zero, its gap   {_percent(result['jump_of_zero_gap_pct'])}  (the price of asking)")
    saved = _percent(result["backward_reduction_pct"])
    lines.append(f"backward passes saved   {saved}  (against the plain run of equal loss)")
    return "\n".join([*lines, "", result["verdict"]])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first flush left, the others flush right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def _row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    loss, std = arm["final_val_loss"], arm["final_val_loss_std"]
    jumps = f"{arm['num_jumps_accepted']:g}/{arm['num_jumps_proposed']:g}" if arm["kind"] != "plain" else "-"
    return (
        arm["name"],
        "diverged" if loss is None else f"{loss:.4g}" + (f" ± {std:.2g}" if std is not None else ""),
        f"{in_steps(arm['cost_units']):.1f}",
        f"{arm['wall_s']:.2f}",
        f"{arm['num_forward']:.0f}",
        f"{arm['num_backward']:.0f}",
        jumps,
        f"{arm['lr']:g}",
    )


def _interval(ends: Sequence[float] | None) -> str:
    return f"95 % CI {ends_words(ends, '.3f')}" if ends is not None else "no interval"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f} %"


def short_value(value: object) -> str:
    """A value as a line of text shows it: what a file says may be a page long."""
    told = value if isinstance(value, str) and value.isprintable() else repr(value)
    return told if len(told) <= 120 else f"{told[:117]}..."

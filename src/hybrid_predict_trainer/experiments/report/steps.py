"""What was done to the optimizer's own steps: multiplier, group warm-up, extrapolation and damping."""

from __future__ import annotations

from .charts import escape
from .data import Record, Report, number, table_of
from .parts import UNKNOWN, format_value, html_table

#: Counts that the section shows, as ``statistics()`` names them.
COUNTS = ("learned_scale", "num_raises_taken_back", "num_early_cuts", "lookahead_effect", "lookahead_switched_off")


def steps_table(report: Report) -> str:
    """One row per run that was not plain; the section is left out where none is told of."""
    rows = []
    for run in report.runs:
        counts = table_of(run.summary.get("statistics"))
        if run.arm == "plain" or not any(name in counts for name in COUNTS):
            continue
        factor, effect = number(counts.get("learned_scale")), number(counts.get("lookahead_effect"))
        off = counts.get("lookahead_switched_off")
        state = UNKNOWN if not isinstance(off, bool) else "switched off by its trial" if off else "in use"
        rows.append([
            escape(run.name, 60), UNKNOWN if factor is None else f"{factor:.3g}&times;",
            format_value(counts.get("num_raises_taken_back")), format_value(counts.get("num_early_cuts")),
            UNKNOWN if effect is None else f"{effect:+.2g}".replace("-", "&minus;"), f"text:{state}",
            f"text:{rates_words(run.summary)}",
        ])  # fmt: skip
    if not rows:
        return ""
    head = ["Run", "Multiplier of the learning rate", "Raises taken back", "Group warm-up: cuts",
            "Extrapolation and damping: effect on the loss", "text:Lookahead", "text:Peak rates by role"]  # fmt: skip
    told = "What needs no jump: longer steps, slower first steps of groups, and the low-pass between steps. "
    told += "An effect that its holdout has not shown is not measured. Peak rates: the schedule's peak, times the "
    told += "multiplier and the recipe's factor of the role."
    return f"<h2>Steps of the optimizer</h2>{html_table(head, rows)}<p><small>{told}</small></p>"


def rates_words(summary: Record) -> str:
    """Peak rates by role, those of the same size together."""
    rates = {role: number(rate) for role, rate in table_of(summary.get("peak_rates")).items()}
    roles: dict[str, list[str]] = {}
    for role, rate in rates.items():
        if rate is not None:
            roles.setdefault(f"{rate:.3g}", []).append(escape(role.replace("_", " "), 40))
    return "; ".join(f"{', '.join(names)} {rate}" for rate, names in roles.items()) or UNKNOWN

"""The report's table of what the trainer took back by itself: the guard's alarms, raises, and whatever failed."""

from __future__ import annotations

from .report.charts import escape
from .report.data import Record, Report, Run, list_of, number, table_of
from .report.parts import format_value, html_table

#: Counts of ``statistics`` that are nothing to tell of where they are 0, and the heads of their columns.
COUNTS = {
    "num_guard_alarms": "Guard's alarms",
    "num_guard_restores": "States that came back",
    "num_guard_retries": "Second tries at a lower rate",
    "num_raises_taken_back": "Raises taken back",
    "num_rollbacks": "Jumps rolled back",
    "num_outside_writes": "Writes from outside",
}


def withdrawn_table(report: Report) -> str:
    """One row per run of ours: was it withdrawn, how often was something taken back, what failed."""
    title = "<h2>Withdrawn and taken back</h2>"
    known = [(run, table_of(run.summary.get("statistics"))) for run in report.runs]
    known = [(run, found) for run, found in known if "withdrawn" in found]
    if not known:
        return f"{title}<p>Not recorded.</p>"
    told = [(run, found) for run, found in known if _has_something(run, found)]
    if not told:
        return f"{title}<p>The guard raised no alarm, nothing was taken back, and nothing failed.</p>"
    out = [title]
    names = [escape(run.name, 60) for run, found in told if found["withdrawn"] is True]
    if names:
        out.append(
            f'<p class="notice">Withdrawn: {", ".join(names)}. The training loss stood above its best by more than its '
            "noise, so prediction, learned multiplier and lookahead ended, and the run went on as the plain loop.</p>"
        )
    head = ["Run", "text:Withdrawn", *COUNTS.values(), "text:Failed"]
    rows = [
        [escape(run.name, 60), f"text:{'yes' if found['withdrawn'] is True else 'no'}",
         *(format_value(found.get(key)) for key in COUNTS), f"text:{_failures(run)}"]
        for run, found in told
    ]  # fmt: skip
    return "".join(out) + html_table(head, rows)


def _has_something(run: Run, found: Record) -> bool:
    counted = any((number(found.get(key)) or 0) > 0 for key in COUNTS)
    return found["withdrawn"] is True or counted or bool(table_of(run.summary.get("failures")))


def _failures(run: Run) -> str:
    """What failed, how often, and what was raised first."""
    told = []
    for place, value in table_of(run.summary.get("failures")).items():
        found = table_of(value)
        times = "time" if found.get("count") == 1 else "times"
        left_alone = ", left alone since" if found.get("left_alone") is True else ""
        first = escape(found.get("first"), 200)
        told.append(f"{escape(place, 20)}, {format_value(found.get('count'))} {times}{left_alone}: {first}")
    notes = [f"note: {escape(note, 200)}" for note in list_of(run.summary.get("notes"))]
    return "; ".join([*told, *notes]) or "nothing"

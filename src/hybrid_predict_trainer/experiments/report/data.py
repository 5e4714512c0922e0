"""What a report reads: the files of a comparison or a run -> frozen records."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...safe_files import read_json_object, read_lines

Record = Mapping[str, Any]

PHASES = ("warmup", "full", "predict", "correct")
LEVELS = ("normal", "caution", "warning", "critical")


@dataclass(frozen=True, slots=True)
class Step:
    """What the figures need of one training step."""

    step: float
    phase: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run's records: steps, the rarer events by name, and the summary."""

    name: str
    arm: str
    steps: tuple[Step, ...]
    events: Mapping[str, tuple[Record, ...]]
    summary: Record

    def of(self, event: str) -> tuple[Record, ...]:
        """All records of one kind, in order."""
        return self.events.get(event, ())

    @property
    def is_hybrid(self) -> bool:
        """Whether it ever proposed or took a predicted step."""
        return bool(self.of("jump")) or any(s.phase in ("predict", "correct") for s in self.steps)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows."""

    title: str
    compare: Record | None
    arms: tuple[Record, ...]
    runs: tuple[Run, ...]
    styles: Mapping[str, str]  # arm -> classes of colour and dash
    notices: tuple[str, ...]


def number(value: object) -> float | None:
    """The value as a float; None if it is not a number a chart could show."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    if not abs(found) < 1e100:
        return None
    return 0.0 if abs(found) < 1e-100 else found


def table_of(value: object) -> Record:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def list_of(value: object) -> list[Any]:
    """The value if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def read_json(path: Path) -> Record:
    """A JSON object from a file; a ValueError with the file's name if it holds none."""
    return read_json_object(path)


def read_records(path: Path) -> tuple[list[Record], tuple[str, ...]]:
    """Records of a metrics file, in order, and notices.

    A torn last line is left out with a notice, a torn line before it is a ValueError.  Where the step
    count goes back the run was resumed: records of the abandoned attempt are left out with a notice.
    """
    found: list[Record] = []
    last = -1.0  # of the newest step
    torn, num_superseded = 0, 0
    for at, raw in enumerate(read_lines(path), 1):
        if not raw.strip():
            continue
        if torn:
            raise ValueError(f"{path}:{torn}: not a JSON object")
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            torn = at
            continue
        if record.get("event") == "step":
            step = number(record.get("step"))
            if step is None:
                record["step"] = step = last + 1
            if step <= last:
                before = len(found)
                found = [r for r in found if _is_before(r, step)]
                num_superseded += before - len(found)
            last = step
        found.append(record)
    notices = [f"the last line of {path.name} was torn and has been left out"] if torn else []
    if num_superseded:
        notices.append(f"resumed: {num_superseded} records of an abandoned attempt have been left out")
    return found, tuple(notices)


def _is_before(record: Record, step: float) -> bool:
    """Whether a record stands when training goes on at a step; one of no step does."""
    at = number(record.get("step")) or 0.0
    return at < step if record.get("event") == "step" else at <= step


def read_metrics(path: Path) -> tuple[tuple[Step, ...], dict[str, tuple[Record, ...]], tuple[str, ...]]:
    """Steps, other events by name, and notices of a metrics file, as :func:`read_records` finds them."""
    records, notices = read_records(path)
    steps = [
        Step(number(r["step"]) or 0.0, str(r.get("phase")), number(r.get("loss")))
        for r in records
        if r.get("event") == "step"
    ]
    events: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.get("event") != "step":
            events[str(record.get("event", ""))].append(record)
    return tuple(steps), {name: tuple(rows) for name, rows in events.items()}, notices


def load(run_dir: Path) -> Report:
    """Read a directory of ``compare.json`` and ``runs/``, or of runs, or of one run's ``metrics.jsonl``."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such directory")
    compare = read_json(run_dir / "compare.json") if (run_dir / "compare.json").exists() else None
    runs, notices = [], []
    files = [*run_dir.glob("runs/*/metrics.jsonl"), *run_dir.glob("metrics.jsonl")]
    if compare is None and not files:
        files = [*run_dir.glob("*/metrics.jsonl")]
    for file in sorted(files):
        steps, events, remarks = read_metrics(file)
        folder = file.parent
        summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
        name = folder.resolve().name
        named = re.fullmatch(r"(.+)-s\d+", name)
        runs.append(Run(name, named[1] if named else name, steps, events, summary))
        notices += [f"{name}: {remark}" for remark in remarks]
    if compare is None and not runs:
        raise FileNotFoundError(
            f"{run_dir}: nothing to report: no compare.json, and no metrics.jsonl in it, in */ or in runs/*/"
        )
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[run.arm].append(run)
    told = [a for a in list_of((compare or {}).get("arms")) if isinstance(a, Mapping)]
    arms = tuple(told) or tuple(arm_of(name, members) for name, members in by_arm.items())
    names = dict.fromkeys([*(str(a.get("name", "unnamed")) for a in arms), *by_arm])
    title = "Comparison" if compare is not None else "Run" if len(runs) == 1 else "Runs"
    return Report(f"{title}: {run_dir.resolve().name}", compare, arms, tuple(runs), arm_styles(names), tuple(notices))


def arm_of(name: str, runs: Sequence[Run]) -> Record:
    """A row of the table of arms from its runs alone, where no comparison was written."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return statistics.fmean(known) if known else None

    ends = [run.of("validation")[-1] if run.of("validation") else {} for run in runs]
    finals = [v for end in ends if (v := number(end.get("val_loss"))) is not None]
    row: dict[str, Any] = {"name": name, "n": len(runs), "final_val_loss": mean(finals)}
    row["final_val_loss_std"] = statistics.stdev(finals) if len(finals) > 1 else None
    row |= {key: mean(number(end.get(key)) for end in ends) for key in ("cost_units", "wall_s")}
    counts = [table_of(run.summary.get("statistics")) for run in runs]
    for key in ("real_steps", "claimed_steps", "credited_steps", "forward", "backward"):
        row[f"num_{key}"] = mean(number(c.get(f"num_{key}")) for c in counts)
    row["num_jumps_proposed"] = mean(float(len(run.of("jump"))) for run in runs)
    row["num_jumps_accepted"] = mean(float(sum(j.get("accepted") is True for j in run.of("jump"))) for run in runs)
    return row


def arm_styles(names: Iterable[str]) -> dict[str, str]:
    """Colours by role: plain arms share one and differ by dash, the rest take turns."""
    styles: dict[str, str] = {}
    fixed, num_plain, num_other = {"plain": "c0", "hybrid": "c1", "jump-of-zero": "c2"}, 0, 0
    for name in names:
        if name in fixed:
            styles[name] = fixed[name]
        elif name.startswith("plain"):
            styles[name], num_plain = f"c0 d{1 + num_plain % 3}", num_plain + 1
        else:
            styles[name], num_other = f"c{3 + num_other % 5}", num_other + 1
    return styles

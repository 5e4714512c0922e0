"""One thing changed at a time in a run with half of its steps predicted: horizon, correction frequency, predictor,
confidence threshold.  Beside each stands the same run with jumps of zero."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object, write_text
from ...tell.sinks import jsonable
from ..statistics import t_interval
from .forced import ForcedRun, forced, plain, zero_of
from .hybrid import gap
from .loop import FORECASTERS, WINDOW, task_of
from .plain import SCALES
from .stored import read_from

FORMAT = 1
SHARE = 0.5
#: Name -> values of what is changed.
VALUES: dict[str, tuple[Any, ...]] = {
    "horizon": (5, 10, 20, 40, 80),
    "frequency": (WINDOW, 2 * WINDOW, 4 * WINDOW),
    "predictor": FORECASTERS,
    "confidence": (0.0, 0.2, 0.4, 0.6, 0.8),
}
FIELDS = {"horizon": "horizon", "frequency": "every", "predictor": "predictor", "confidence": "least_confidence"}


def measure(name: str, scale_name: str, num_seeds: int, out: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run what is missing of one ablation.

    Args:
        name: A key of :data:`VALUES`.
        scale_name: A key of ``plain.SCALES``.
        num_seeds: At least one.
        out: Folder of the results, one file per seed.
        tell: Takes a line about every run.

    Raises:
        ConfigError: a stored result is damaged or of another version or size.
    """
    logs = []
    for seed in range(num_seeds):
        path = out / f"ablation-{name}-{scale_name}-seed{seed}.json"
        if not path.exists():
            found = {
                "format": FORMAT,
                "config": asdict(SCALES[scale_name]),
                "runs": _runs(name, scale_name, seed, tell),
            }
            write_text(path, json.dumps(jsonable(found), indent=1) + "\n")
        stored = read_json_object(path)
        same = jsonable(asdict(SCALES[scale_name]))
        if stored.get("format") != FORMAT or stored.get("config") != same or not isinstance(stored.get("runs"), list):
            raise ConfigError(f"{path}: is of another version or size, or damaged; delete it or choose another --out")
        with read_from(path):
            _over_seeds([stored["runs"]])
        logs.append(stored["runs"])
    with read_from(out):
        rows = _over_seeds(logs)
    return {"ablation": name, "scale": scale_name, "seeds": num_seeds, "rows": rows}


def _over_seeds(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows by value of what is changed: means over seeds, and the interval of the gap."""
    rows = []
    for same_value in zip(*logs, strict=True):
        gaps = {kind: [_finite(r[kind]) for r in same_value] for kind in ("gap", "zero_gap")}
        told = t_interval(gaps["gap"])
        rows.append({"value": same_value[0]["value"], "gap": told.mean, "interval": told.ends,
                     "zero_gap": sum(gaps["zero_gap"]) / len(logs), "share": float(same_value[0]["share"]),
                     "jumps": sum(r["jumps"] for r in same_value) / len(logs)})  # fmt: skip
    return rows


def _finite(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _runs(name: str, scale_name: str, seed: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    scale = SCALES[scale_name]
    task = task_of(scale)
    baseline = plain(scale, seed, task)[1].to_json()
    base = ForcedRun(share=SHARE, horizon=dict(scale.jump_steps)[50], predictor=scale.forced)
    rows, zeros = [], {}
    for value in VALUES[name]:
        plan = replace(base, **{FIELDS[name]: value})
        ours = forced(scale, seed, task, plan)[1].to_json()
        # of jumps that go nowhere it makes no difference who told them
        key = "" if name == "predictor" else value
        if key not in zeros:
            zeros[key] = forced(scale, seed, task, zero_of(plan))[1].to_json()
        rows.append({"value": value, "gap": gap(ours, baseline), "zero_gap": gap(zeros[key], baseline),
                     "share": ours["predicted_share"], "jumps": ours["jumps"]})  # fmt: skip
        tell(f"seed {seed}: {name} {value}: {100 * rows[-1]['gap']:.2f} % above the baseline's loss, "
             f"jumps of zero {100 * rows[-1]['zero_gap']:.2f} %")  # fmt: skip
    return rows


HEAD = ("loss above the baseline's", "95 % interval", "jumps of zero", "predicted share", "jumps")


def format_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows for a person."""
    rows = []
    for r in found["rows"]:
        ends = "-" if r["interval"] is None else f"{100 * r['interval'][0]:.2f} to {100 * r['interval'][1]:.2f} %"
        rows.append([str(r["value"]), f"{100 * r['gap']:.2f} %", ends, f"{100 * r['zero_gap']:.2f} %",
                     f"{100 * r['share']:.0f} %", f"{r['jumps']:.0f}"])  # fmt: skip
    return rows


def format_text(found: Mapping[str, Any]) -> str:
    """What a person reads."""
    from ..report.text import aligned

    return "\n".join(aligned((found["ablation"], *HEAD), format_table(found)))


def markdown(found: Mapping[str, Any]) -> str:
    """A table of docs/validation.md."""
    head = (found["ablation"], *HEAD)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in format_table(found))]) + "\n"

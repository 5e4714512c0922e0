"""A run's records as columns: the metrics file of any trainer, with settings and summary where they lie beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.settings import HybridTrainerConfig
from ..config.toml import load
from ..records import ConfigError
from ..safe_files import UnusableFileError, read_json_object, read_lines

#: Losses of next-token prediction in nats, where the founding document's absolute bounds mean something.
LANGUAGE = ("gpt", "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run has written down, oldest first; a number that is not there is NaN."""

    losses: tuple[float, ...]  # of every real step
    norms: tuple[float, ...]  # gradient norm of every real step, before clipping
    rates: tuple[float, ...]  # learning rate of every real step
    phases: tuple[str, ...]  # of every step
    reasons: tuple[str, ...]  # of every step
    skipped: int = 0  # steps whose loss or gradient was not finite
    validation: tuple[tuple[int, float], ...] = ()  # (number of real steps, loss)
    jumps: tuple[Mapping[str, Any], ...] = ()
    alarms: tuple[Mapping[str, Any], ...] = ()
    health: tuple[Mapping[str, Any], ...] = ()  # reports of the checklists
    config: HybridTrainerConfig = field(default_factory=HybridTrainerConfig)
    task: str = ""
    lr: float = math.nan  # peak
    checkpoint: str = ""  # newest, as a path
    num_unread: int = 0  # lines that are no records: torn by a kill, damaged, or somebody else's

    @property
    def is_language(self) -> bool:
        """Whether the loss is one of next-token prediction."""
        return self.task in LANGUAGE


def read_record(path: str | Path) -> RunRecord:
    """Read a folder of ``hpt train``, or a metrics file.

    Raises:
        ConfigError: there are no records of steps, a file cannot be read, or it is a folder of several runs.
    """
    path = Path(path)
    if path.is_dir() and not (path / "metrics.jsonl").exists():
        _refuse_several(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    folder = file.parent
    try:
        lines = [_event(line) for line in read_lines(file) if line.strip()]
        run = read_json_object(folder / "run.json") if (folder / "run.json").exists() else {}
        summary = read_json_object(folder / "summary.json") if (folder / "summary.json").exists() else {}
    except (UnusableFileError, OSError) as error:
        raise ConfigError(f"{path}: no records of a run can be read: {error}") from None
    events = [event for event in lines if event is not None]
    num_unread = len(lines) - len(events)
    if not any(event["event"] == "step" for event in events):
        torn = f" ({num_unread} of its {len(lines)} lines cannot be read)" if num_unread else ""
        raise ConfigError(
            f"{path}: holds no records of steps{torn}; name a folder of 'hpt train' or the file of metrics.path"
        )
    config = load(folder / "config.toml") if (folder / "config.toml").exists() else HybridTrainerConfig()
    options = run.get("options")
    task = str(options.get("task", "")) if isinstance(options, dict) else ""
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint_step_*"), key=lambda p: p.stat().st_mtime)
    return _columns(events, config=config, task=task, lr=_number(summary.get("lr")), num_unread=num_unread,
                    checkpoint=str(checkpoints[-1]) if checkpoints else "")  # fmt: skip


def _refuse_several(path: Path) -> None:
    """A comparison, a search or another folder of runs is told from one without any.

    Raises:
        ConfigError: there are runs below; the message names one.
    """
    runs = sorted(file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/metrics.jsonl"))
    if runs:
        several = f"{len(runs)} runs" if len(runs) > 1 else "a run"
        raise ConfigError(f"{path}: is a folder of {several} and no run: name one, such as {runs[0]}")


def _event(line: bytes) -> dict[str, Any] | None:
    """A record; None for a torn or foreign line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _columns(events: list[dict[str, Any]], **known: Any) -> RunRecord:
    steps = [e for e in events if e["event"] == "step"]
    real = [e for e in steps if not e.get("was_predicted") and e.get("phase") != "predict"]
    rates = tuple(_number(e.get("lr")) for e in real)
    if math.isnan(known["lr"]) and rates:
        known["lr"] = max((rate for rate in rates if math.isfinite(rate)), default=math.nan)

    def of_kind(kind: str) -> tuple[dict[str, Any], ...]:
        return tuple(e for e in events if e["event"] == kind)

    return RunRecord(
        losses=tuple(_number(e.get("loss")) for e in real), norms=tuple(_number(e.get("gradient_norm")) for e in real),
        rates=rates, phases=tuple(str(e.get("phase")) for e in steps),
        reasons=tuple(str(e.get("reason")) for e in steps), skipped=sum(bool(e.get("skipped")) for e in steps),
        validation=tuple(
            (int(e.get("num_real_steps", 0)), _number(e.get("val_loss"))) for e in of_kind("validation")
        ),
        jumps=of_kind("jump"), alarms=of_kind("divergence"), health=of_kind("health"), **known,
    )  # fmt: skip


def _number(value: object) -> float:
    """A number of a record; what JSON cannot hold (null, "inf") is NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

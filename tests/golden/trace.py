"""What is written down of a run, and where two such records first differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Fields that tell the time or the memory of a build, not what it decided.
NOT_COMPARED = frozenset(
    {
        "step_time_ms", "epoch_time_s", "wall_s", "encode_time_ms_avg", "predict_time_ms_avg", "update_time_ms_avg",
        "pct_of_step_time", "memory_used_mb", "basis_mb",
    }
)  # fmt: skip
#: Today's name -> its earlier one.  Who renames a figure of ``statistics()``, the summary or a record adds a line.
RENAMED: dict[str, str] = {}
#: Today's wording -> its earlier one, for texts that are compared (reasons, signals, events).
REWORDED: dict[str, str] = {
    "no multiple of the step lowers the loss; the weights go back to the start of the last real step":
        "no step is better than where the last real step began, and that was better than here",
    "approved, but held out to measure what jumps are worth": "approved, but skipped as a control for the ledger",
}  # fmt: skip

Row = dict[str, Any]


@dataclass
class Trace:
    """Of one run: a row for each step, the lines of its JSONL file, and how it ended, by dotted name."""

    steps: list[Row] = field(default_factory=list)
    records: list[Row] = field(default_factory=list)
    end: Row = field(default_factory=dict)
    error: str = ""  # what the run raised, if it did
    seconds: float = 0.0

    def figure(self, name: str) -> Any:
        """One of ``statistics()``."""
        return self.end.get(f"statistics.{name}")


def digest(tensor: Tensor) -> str:
    """The first digits of the SHA-256 of a tensor's dtype, shape and bytes."""
    told = tensor.detach().cpu().contiguous()
    told_as = f"{told.dtype} {tuple(told.shape)}".encode()
    if told.is_complex():
        told = torch.view_as_real(told)
    data = told.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(told_as + data).hexdigest()[:16]


def weights_digest(model: torch.nn.Module) -> str:
    """Of all parameters and buffers together."""
    parts = [f"{name} {digest(value)}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def flat(value: Any, prefix: str = "") -> Row:
    """Leaves by dotted name: tensors as digests, texts in their earlier wording, fields that tell the time left out."""
    if isinstance(value, Tensor):
        return {prefix: digest(value)}
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = [("length", len(value)), *enumerate(value)]
    elif isinstance(value, str):
        return {prefix: REWORDED.get(str(value), str(value))}
    elif value is None or isinstance(value, bool | int | float):
        return {prefix: value}
    else:
        return {prefix: type(value).__name__}
    found: Row = {}
    for key, below in items:
        name = RENAMED.get(str(key), str(key))
        if name not in NOT_COMPARED:
            found |= flat(below, f"{prefix}.{name}" if prefix else name)
    return found


def records_of(path: Path) -> list[Row]:
    """The lines of a JSONL file, flattened."""
    if not path.exists():
        return []
    return [flat(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b)) and repr(a) == repr(b)


def _row_difference(old: Row, new: Row) -> str | None:
    for name, value in old.items():
        if name not in new:
            return f"{name} is gone (it was {value!r})"
        if not _same(value, new[name]):
            return f"{name} is {value!r} in the earlier build and {new[name]!r} in this one"
    return None


def first_difference(old: Trace, new: Trace) -> str | None:
    """The first step, record or figure that is not the same in both, or None.

    Fields that only the new trace has are no difference: see :func:`added`.
    """
    for index, (a, b) in enumerate(zip(old.steps, new.steps, strict=False)):
        if found := _row_difference(a, b):
            return f"step {index + 1}: {found}"
    if old.error != new.error:
        return f"after step {min(len(old.steps), len(new.steps))}: {old.error or 'ended'}; now {new.error or 'ended'}"
    if len(old.steps) != len(new.steps):
        return f"{len(old.steps)} steps in the earlier build and {len(new.steps)} in this one"
    for index, (a, b) in enumerate(zip(old.records, new.records, strict=False)):
        if found := _row_difference(a, b):
            return f"line {index + 1} of the JSONL file ({a.get('event')}, step {a.get('step')}): {found}"
    if len(old.records) != len(new.records):
        return f"{len(old.records)} lines in the JSONL file of the earlier build and {len(new.records)} in this one's"
    found = _row_difference(old.end, new.end)
    return f"at the end: {found}" if found else None


#: What a step decides, as its row has it.
DECISIONS = (
    "phase", "reason", "was_predicted", "candidate", "skipped", "consumed", "num_forward", "num_claimed_steps", "alarm",
)  # fmt: skip


def how_far(old: Trace, new: Trace) -> str:
    """Whether two runs that differ decide alike, and by how much their losses part: rounding, or another run."""
    furthest = 0.0
    for index, (a, b) in enumerate(zip(old.steps, new.steps, strict=False)):
        if any(a.get(name) != b.get(name) for name in DECISIONS):
            return f"another decision at step {index + 1}, losses within {furthest:.1e} until then"
        x, y = a.get("loss"), b.get("loss")
        if isinstance(x, float) and isinstance(y, float) and x != y:
            furthest = max(furthest, abs(x - y) / max(abs(x), abs(y)))
    return f"the same decisions in {len(new.steps)} steps, losses within {furthest:.1e}"


def added(old: Trace, new: Trace) -> set[str]:
    """Names of fields that only the new trace has."""
    pairs = [(old.end, new.end), *zip(old.steps, new.steps, strict=False), *zip(old.records, new.records, strict=False)]
    return {name for a, b in pairs for name in b if name not in a}

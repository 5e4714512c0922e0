"""A criterion, its evidence, and the control that it has to fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One bar.

    Attributes:
        name: what is measured.
        value: as measured.
        bar: that it is held against.
        sense: "above" or "below" the bar is a pass.
        control: the same figure of a sequence in which there is nothing to find, or of a trivial predictor.
        control_name: what that is.
        ceiling: the best that the noise of the data leaves to anybody; None where that was not measured.
    """

    name: str
    value: float
    bar: float
    sense: Literal["above", "below"]
    control: float
    control_name: str
    ceiling: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the bar is met."""
        return _meets(self.value, self.bar, self.sense)

    @property
    def control_passes(self) -> bool:
        """Whether the control meets it too: a pass then shows nothing."""
        return _meets(self.control, self.bar, self.sense)

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or PASS with the remark that the control passes as well."""
        if not self.passed:
            return "FAIL"
        return "PASS (the control passes too: no evidence)" if self.control_passes else "PASS"

    def to_json(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        return {**asdict(self), "passed": self.passed, "control_passes": self.control_passes, "verdict": self.verdict}


def _meets(value: float, bar: float, sense: str) -> bool:
    """NaN meets nothing."""
    return value > bar if sense == "above" else value < bar


def over_seeds(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each criterion over all seeds: mean and t interval of its value, and how many seeds passed.

    Args:
        runs: Per seed, :meth:`Criterion.to_json` of the same criteria in the same order.
    """
    from ..statistics import t_interval

    found = []
    for same in zip(*runs, strict=True):
        values = [math.nan if c["value"] is None else float(c["value"]) for c in same]
        interval = t_interval(values)
        mean = Criterion(
            name=same[0]["name"], value=interval.mean, bar=_mean([c["bar"] for c in same]), sense=same[0]["sense"],
            control=_mean([c["control"] for c in same]), control_name=same[0]["control_name"],
            ceiling=None if same[0].get("ceiling") is None else _mean([c.get("ceiling") for c in same]),
        )  # fmt: skip
        found.append({
            **mean.to_json(), "values": values, "interval": interval.ends, "n": len(same),
            "seeds_passed": sum(c["passed"] for c in same),
        })  # fmt: skip
    return found


def _mean(values: Sequence[float | None]) -> float:
    """NaN where one is missing; equal values are not rounded."""
    known = [math.nan if v is None else float(v) for v in values]
    return known[0] if len(set(known)) == 1 else sum(known) / len(known)

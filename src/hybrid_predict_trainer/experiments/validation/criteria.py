"""A criterion, its evidence, and the control that it has to fail."""

from __future__ import annotations

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
    """

    name: str
    value: float
    bar: float
    sense: Literal["above", "below"]
    control: float
    control_name: str

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
        interval = t_interval([c["value"] for c in same])
        mean = Criterion(
            name=same[0]["name"], value=interval.mean, bar=same[0]["bar"], sense=same[0]["sense"],
            control=sum(c["control"] for c in same) / len(same), control_name=same[0]["control_name"],
        )  # fmt: skip
        found.append({
            **mean.to_json(), "interval": interval.ends, "n": len(same), "seeds_passed": sum(c["passed"] for c in same)
        })  # fmt: skip
    return found

"""What is left of a jump that is judged in several pieces."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import PhasePrediction, StateDict


@dataclass(slots=True)
class Segment:
    """What is left of a jump that is checked in several pieces."""

    prediction: PhasePrediction
    num_left: int


def segment_state(s: Segment | None) -> StateDict | None:
    """Plain containers."""
    if s is None:
        return None
    p = s.prediction
    return {
        "num_left": s.num_left, "coefficients": p.coefficients, "horizon": p.horizon,
        "predicted_loss": p.predicted_loss, "predicted_reduction": p.predicted_reduction,
        "confidence": p.confidence, "max_scale": p.max_scale, "alternatives": list(p.alternatives),
    }  # fmt: skip


def segment_from(state: StateDict | None) -> Segment | None:
    """Inverse of :func:`segment_state`."""
    if state is None:
        return None
    values = dict(state)
    num_left = values.pop("num_left")
    values["alternatives"] = tuple(values["alternatives"])
    return Segment(PhasePrediction(**values), num_left)

"""Confidence: the probability that a jump will be kept and pay for itself."""

from __future__ import annotations

from dataclasses import dataclass

from .records import State


@dataclass(slots=True)
class TrackRecord:
    """Share of this run's jumps that were kept, with forgetting and a uniform prior.

    A Beta(1, 1) prior makes the first answer 0.5 and keeps a handful of outcomes from meaning
    certainty; forgetting lets a run that changes its mind be believed again.
    """

    forgetting: float = 0.9
    num_outcomes: int = 0
    successes: float = 0.0
    failures: float = 0.0

    def record(self, kept: bool) -> None:
        """Add the outcome of one jump."""
        self.num_outcomes += 1
        self.successes = self.forgetting * self.successes + float(kept)
        self.failures = self.forgetting * self.failures + float(not kept)

    @property
    def confidence(self) -> float:
        """In (0, 1)."""
        return (self.successes + 1) / (self.successes + self.failures + 2)

    def state_dict(self) -> State:
        """Plain numbers."""
        return {
            "forgetting": self.forgetting, "num_outcomes": self.num_outcomes,
            "successes": self.successes, "failures": self.failures,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.forgetting, self.num_outcomes = state["forgetting"], state["num_outcomes"]
        self.successes, self.failures = state["successes"], state["failures"]

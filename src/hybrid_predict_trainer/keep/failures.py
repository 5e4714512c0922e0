"""What went wrong in prediction, by place: said once, counted, and after three of a kind not asked again.

Nothing that prediction does may end a run.  Whatever raises in a predictor, in a forward of the gate or in what watches
a run is a refusal: everything is as before, training goes on, and who fails three times is left alone for the rest of
the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from ..notices import warn
from ..records import StateDict

#: Failures of one kind after which it is not asked again.
MAX_FAILURES = 3

#: Tables of a state by place: which places there are is the build's, and which of them failed the run's.
TABLES = ("counts", "first", "dropped")


class Place(StrEnum):
    """Where something failed; the value stands in statistics and summary."""

    PREDICTOR = "predictor"
    GATE = "gate"  # a forward of the gate, a snapshot, the move itself
    PIECES = "pieces"  # the batch cannot be cut, and one loss of it says nothing where losses are noisy
    OBSERVER = "observer"  # encoder, factors and their hooks, gradient health
    DATA = "data"  # whether a batch is the one before, or its samples were seen before
    FEEDBACK = "feedback"  # what is learnt from what became of proposals
    MOTION = "motion"  # learned multiplier and lookahead, and what judges them
    WEIGHTS = "weights"  # whether somebody else wrote to the weights, and which of them train
    RECORD = "record"


#: What is said of a failure, and of the third one.
_SAID = {
    Place.PREDICTOR: ("predictor {name!r} failed", "it is not asked again"),
    Place.GATE: ("a proposal could not be judged", "no more proposals are made"),
    Place.PIECES: ("the batch cannot be cut into pieces", "no more proposals are made where losses are noisy"),
    Place.OBSERVER: ("what watches the run (encoder, factors or gradient health) failed", "it is not asked again"),
    Place.DATA: ("a batch cannot be compared with others", "none is, and losses count as noisy"),
    Place.FEEDBACK: ("what became of a proposal cannot be learnt from", "no more proposals are made"),
    Place.MOTION: ("the learned multiplier or the lookahead failed", "both are off"),
    Place.WEIGHTS: (
        "it cannot be seen who else changes the weights", "prediction, learned multiplier and lookahead are off",
    ),
    Place.RECORD: ("a record cannot be written", "no more are written"),
}  # fmt: skip


class Failures:
    """Counts per place."""

    def __init__(self) -> None:
        """Nothing has failed."""
        self.counts: dict[Place, int] = dict.fromkeys(Place, 0)
        self.first: dict[Place, str] = {}  # what was raised first
        self.dropped: dict[Place, str] = {}  # why it is left alone though it did not raise

    def note(self, place: Place, error: BaseException | str, *, name: str = "", quiet: bool = False) -> None:
        """Count one, and say the first and the last.

        Args:
            place: Where.
            error: What was raised, or why not.
            name: Of the predictor.
            quiet: Nothing was raised, and nobody need be warned.
        """
        self.counts[place] += 1
        said, left_alone = _SAID[place]
        told = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.first.setdefault(place, told)
        if quiet or self.counts[place] > 1:
            return
        # one warning per kind: who is left alone after the third shows in statistics()
        warn(
            f"{said.format(name=name)} ({told}); training goes on, after {MAX_FAILURES} times {left_alone}",
        )

    def drop(self, place: Place, why: str, name: str = "") -> None:
        """Leave something alone that works, but not as it should; said once."""
        if place not in self.dropped:
            self.dropped[place] = why
            warn(f"{place.value} {name!r} is too slow ({why}): it is not asked again")

    def agree(self, counts: Sequence[int], dropped: Sequence[bool]) -> list[Place]:
        """Count as the ranks do together, by place in the order of :class:`Place`.

        Returns:
            Places that are exhausted from here on and were not.
        """
        before = [self.exhausted(place) for place in Place]
        for place, count, out in zip(Place, counts, dropped, strict=True):
            if count > self.counts[place]:
                self.first.setdefault(place, "it failed on another rank")
            self.counts[place] = count
            if out:
                self.dropped.setdefault(place, "it was dropped on another rank")
        return [place for place, was in zip(Place, before, strict=True) if not was and self.exhausted(place)]

    def exhausted(self, place: Place) -> bool:
        """Whether it failed too often to be asked again, or was dropped."""
        return self.counts[place] >= MAX_FAILURES or place in self.dropped

    def reason(self, place: Place) -> str:
        """Why it is left alone, in half a sentence; empty if it is not."""
        if not self.exhausted(place):
            return ""
        said, left_alone = _SAID[place]
        told = self.dropped.get(place) or self.first.get(place, "")
        return f"{said.format(name='')} ({told}): {left_alone}".replace(" ''", "")

    def summary(self) -> dict[str, object]:
        """Count and first cause of each kind that occurred."""
        return {
            place.value: {
                "count": count,
                "first": self.first.get(place, self.dropped.get(place)),
                "left_alone": self.exhausted(place),
            }
            for place, count in self.counts.items()
            if count or place in self.dropped
        }

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "counts": {place.value: count for place, count in self.counts.items()},
            "first": {place.value: told for place, told in self.first.items()},
            "dropped": {place.value: why for place, why in self.dropped.items()},
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`; places that another build had are left out, those it had not are at 0."""
        self.counts = {place: state["counts"].get(place.value, 0) for place in Place}
        self.first = {place: state["first"][place.value] for place in Place if place.value in state["first"]}
        self.dropped = {place: state["dropped"][place.value] for place in Place if place.value in state["dropped"]}


def name_of(predictor: object) -> str:
    """As it says, or its class: what fails may fail there, too."""
    try:
        return str(predictor.name)  # type: ignore[attr-defined]
    except Exception:
        return type(predictor).__name__

"""What is done about trouble, and what the trouble was: typed, so that a program can act on it.

A result carries a :class:`Recovery` where something was recovered from (``StepResult.recovery``); what cannot be
recovered from is raised.  Errors have their facts as attributes, and messages for people.
"""

from __future__ import annotations

from dataclasses import dataclass

from .records import CheckpointError, DivergenceError, HybridError

# ---- what the trouble was ------------------------------------------------------------------------------------------
# Named as in the design; not all of them are raised: nothing that prediction does ends a run, so a prediction that went
# wrong is told by the ``error`` of a recovery, which a caller may raise.


class PredictionDivergence(DivergenceError):  # noqa: N818
    """Training went otherwise than predicted, beyond the threshold.

    Attributes:
        actual: Loss that was measured.
        predicted: Loss that was predicted.
        step: Calls of ``step`` so far.
    """

    def __init__(self, actual: float, predicted: float, step: int) -> None:
        """Args: actual: loss.  predicted: loss.  step: when."""
        super().__init__(f"step {step}: the loss is {actual:.6g} where {predicted:.6g} was predicted")
        self.actual, self.predicted, self.step = actual, predicted, step


class NumericalInstability(DivergenceError):  # noqa: N818
    """A loss, a gradient or a weight is not finite, or far beyond what it was.

    Attributes:
        detail: What, and what to do.
        step: Calls of ``step`` so far.
        action: What was done about it; :class:`Abort` where it is raised.
    """

    def __init__(self, detail: str, step: int, action: RecoveryAction | None = None) -> None:
        """Args: detail: a sentence.  step: when.  action: what was done; None: the run cannot be saved."""
        super().__init__(detail)
        self.detail, self.step = detail, step
        self.action: RecoveryAction = Abort(detail) if action is None else action


class PredictorTrainingFailed(HybridError, RuntimeError):  # noqa: N818
    """A predictor raised, or answered nonsense.

    Attributes:
        detail: What it raised first.
        step: Calls of ``step`` so far.
    """

    def __init__(self, detail: str, step: int) -> None:
        """Args: detail: what it raised.  step: when."""
        super().__init__(f"step {step}: the predictor failed: {detail}")
        self.detail, self.step = detail, step


class CheckpointFailed(CheckpointError):  # noqa: N818
    """A checkpoint could not be written; older ones stand.

    Attributes:
        path: Where it was to be.
        detail: What the disk said.
    """

    def __init__(self, path: str, detail: str) -> None:
        """Args: path: where it was to be.  detail: what the disk said."""
        super().__init__(
            f"cannot save checkpoint {path}: {detail}; free space or choose another directory "
            "(older checkpoints are untouched)"
        )
        self.path, self.detail = path, detail


class IntegrationError(HybridError, ImportError):
    """Another library is missing, or is not what it has to be.

    Attributes:
        library: Its name.
        detail: What is wrong, and what to do.
    """

    def __init__(self, library: str, detail: str) -> None:
        """Args: library: its name.  detail: what is wrong."""
        super().__init__(detail, name=library)
        self.library, self.detail = library, detail


# ---- what was done --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continue:
    """Nothing: training goes on as it was."""


@dataclass(frozen=True, slots=True)
class ReducePredictRatio:
    """The horizon of the next jump is this share of what it would have been."""

    factor: float


@dataclass(frozen=True, slots=True)
class ForceFullPhase:
    """So many real steps come before the next proposal."""

    steps: int


@dataclass(frozen=True, slots=True)
class RollbackAndRetry:
    """An earlier state is there again, and training goes on from it at this rate.

    Attributes:
        checkpoint_step: Real steps that the state had seen.
        new_learning_rate: Of the first group.
    """

    checkpoint_step: int
    new_learning_rate: float


@dataclass(frozen=True, slots=True)
class Abort:
    """The run cannot be saved, and has ended: it stands in the error that is raised (``error.action``)."""

    reason: str


RecoveryAction = Continue | ReducePredictRatio | ForceFullPhase | RollbackAndRetry | Abort


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What was done in a step, and about what.

    Attributes:
        step: Calls of ``step`` so far, this one included.
        action: What was done; it has been done when this is returned.
        error: What was wrong, for a caller that would rather stop: ``raise result.recovery.error``.
    """

    step: int
    action: RecoveryAction
    error: HybridError

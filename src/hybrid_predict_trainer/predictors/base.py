"""The one interface between the run and whatever predicts it."""

from __future__ import annotations

from typing import Protocol

from ..records import BasisSpec, PhasePrediction, StateDict, Window


class Predictor(Protocol):
    """A forecaster of the weights: observes windows of real training, predicts the displacement of the next Y steps.

    A predictor sees weight space only through :class:`~..records.Products`, the inner products of the basis columns it
    asked for in ``spec``, and answers with coefficients on those columns.  It must not touch the global random state
    and must not raise on degenerate windows (zero displacement, constant loss); if it raises all the same, training
    goes on, and after three times without it.  docs/extending.md has one in twenty lines.

    Attributes:
        name: As in ``predictor.type``.
        spec: Which columns, and whether their products with gradients are wanted.
    """

    name: str
    spec: BasisSpec

    @property
    def ready(self) -> bool:
        """Whether :meth:`predict` has something to say."""

    def observe(self, window: Window) -> None:
        """Learn from one closed window."""

    def predict(self, horizon: int) -> PhasePrediction:
        """Predict the displacement of the next ``horizon`` real steps after the last observed window.

        Only called when :attr:`ready`.

        Args:
            horizon: Y, real steps, at least 1.

        Returns:
            Coefficients (G, K), float64 on the CPU, with K = ``spec.num_columns``; losses as the training loss.
        """

    def memory_bytes(self) -> int:
        """Bytes this predictor holds (without the basis, which the run accounts for)."""

    def state_dict(self) -> StateDict:
        """Everything learnt, as plain containers, scalars and tensors."""

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, which made ``state``."""

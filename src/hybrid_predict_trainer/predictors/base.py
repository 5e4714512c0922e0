"""The one interface between the run and whatever predicts it."""

from __future__ import annotations

from typing import Protocol

from ..records import BasisSpec, PhasePrediction, State, Window


class Predictor(Protocol):
    """Learns from windows of real training, says where the weights will be Y steps later.

    A predictor sees weight space only through :class:`~..records.Products` (inner products of the
    basis columns it asked for in ``spec``) and answers with coefficients on those columns.  It must
    not touch the global random state and must not raise on degenerate windows (zero displacement,
    constant loss); if it raises all the same, the run goes on without it.
    """

    name: str
    spec: BasisSpec

    @property
    def ready(self) -> bool:
        """Whether :meth:`predict` has something to say."""

    def observe(self, window: Window) -> None:
        """Learn from one closed window."""

    def predict(self, horizon: int) -> PhasePrediction:
        """Predict the aggregate of the next ``horizon`` real steps after the last observed window.

        Only called when :attr:`ready`.  Coefficients have shape (G, K) with K = ``spec.num_columns``.
        """

    def memory_bytes(self) -> int:
        """Bytes this predictor holds (without the basis, which the run accounts for)."""

    def state_dict(self) -> State:
        """Everything learnt, as plain containers, scalars and tensors."""

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""

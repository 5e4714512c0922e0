"""``hold``: what happened last happens again.  The null model every other predictor must beat."""

from __future__ import annotations

from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, PhasePrediction, StateDict, Window, zeros_like_coefficients
from ._common import linear_loss_trajectory


class Hold:
    """Continues the last window's mean displacement for Y steps: c = Y / N on the newest column."""

    name = "hold"

    def __init__(self) -> None:
        """One displacement is all it needs."""
        self.spec = BasisSpec(num_displacements=1)
        self._window: Window | None = None

    @property
    def ready(self) -> bool:
        """After the first displacement."""
        return self._window is not None and self._window.num_columns > 0

    def observe(self, window: Window) -> None:
        """Remember the window."""
        self._window = window

    def predict(self, horizon: int) -> PhasePrediction:
        """Same displacement per step, scaled by the planned learning rate; loss along its slope."""
        window = self._window
        assert window is not None, "predict() before ready"
        coefficients = zeros_like_coefficients(window.products.num_groups, self.spec.num_columns)
        # the displacement scales with the learning rate: a decaying schedule shortens it
        rate = window.lr_ahead / window.lr_integral if window.lr_integral > 0 else 1.0
        coefficients[:, 0] = rate * horizon / window.num_steps
        trajectory = linear_loss_trajectory(window.loss, window.loss_slope, horizon)
        return PhasePrediction(
            coefficients=coefficients,
            horizon=horizon,
            predicted_loss=trajectory[-1][1],
            loss_trajectory=trajectory,
            predicted_reduction=max(window.loss - trajectory[-1][1], 0.0),
        )

    def memory_bytes(self) -> int:
        """A handful of numbers."""
        return 0

    def state_dict(self) -> StateDict:
        """The last window."""
        return {"window": window_state(self._window)}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window = window_from_state(state["window"])

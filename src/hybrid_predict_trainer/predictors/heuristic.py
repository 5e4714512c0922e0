"""``heuristic``: the magnitude formula of the founding documents, along the mean gradient.

    delta = -lr * ||g|| * (1 + scale) * (1 + (L_start - L_predicted) / L_start) * Y * g / ||g||

The formula is a size, not a direction; the only direction its terms know is the gradient's.  Under
Adam it is wrong by construction (an Adam step does not depend on ||g||): it is here as a baseline.
"""

from __future__ import annotations

from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, PhasePrediction, StateDict, Window, zeros_like_coefficients
from ._common import linear_loss_trajectory


class Heuristic:
    """One-vector special case of the basis: the gradient column."""

    name = "heuristic"

    def __init__(self, scale: float = 0.0) -> None:
        """Args: scale: the formula's learned scale, in (-1, 1); 0 where nothing was learnt."""
        self.scale = scale
        self.spec = BasisSpec(num_displacements=1, gradient=True)
        self._window: Window | None = None

    @property
    def ready(self) -> bool:
        """After the first displacement."""
        return self._window is not None and self._window.num_columns > 0

    def observe(self, window: Window) -> None:
        """Remember the window."""
        self._window = window

    def predict(self, horizon: int) -> PhasePrediction:
        """The formula, with the loss continued along its slope as L_predicted."""
        window = self._window
        assert window is not None, "predict() before ready"
        trajectory = linear_loss_trajectory(window.loss, window.loss_slope, horizon)
        predicted = trajectory[-1][1]
        improvement = (window.loss - predicted) / window.loss if window.loss else 0.0
        coefficients = zeros_like_coefficients(window.products.num_groups, self.spec.num_columns)
        # lr * ||g|| * g / ||g|| = lr * g: the norm cancels against the unit direction
        coefficients[:, -1] = -window.lr_ahead / window.num_steps * (1 + self.scale) * (1 + improvement) * horizon
        return PhasePrediction(
            coefficients=coefficients,
            horizon=horizon,
            predicted_loss=predicted,
            loss_trajectory=trajectory,
            predicted_reduction=max(window.loss - predicted, 0.0),
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

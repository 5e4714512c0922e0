"""The final loss of a run in progress, from its loss curve and its planned learning rates.

Knows nothing of the trainer: whoever has (step, loss) pairs and a schedule can ask.  See :func:`forecast`.
"""

from __future__ import annotations

from .curve import Curve
from .final_loss import Forecast, forecast
from .law import Plan
from .prior import PRIORS, Prior
from .schedules import planned_rates

__all__ = ["PRIORS", "Curve", "Forecast", "Plan", "Prior", "forecast", "planned_rates"]

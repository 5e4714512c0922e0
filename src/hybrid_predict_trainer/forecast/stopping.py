"""Stop a single run when its forecast says that going on is not worth it: :class:`StopWhen`.

The run is judged a fixed number of times from a quarter of it on, where forecasts were measured, and the confidence
holds for all of these looks together (Bonferroni).  A forecast knows the rest of the schedule.  While most of the
rate's fall is still ahead nothing is stopped for want of a gain: that fall is where the gain comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..notices import warn
from ..records import ConfigError
from .curve import Array
from .final_loss import Forecast

#: Looks at a run, at equal distances from this share of it on.
NUM_LOOKS, FIRST_SHARE = 12, 0.25
#: Share of the rate's fall that has to be over before a run stops for want of a gain.
FALL_DONE = 0.5


@dataclass(frozen=True, slots=True)
class Advice:
    """What a look came to.

    Attributes:
        stop: whether the run is not worth going on with.
        reason: a sentence; empty where it is.
        forecast: that it rests on.
    """

    stop: bool
    reason: str
    forecast: Forecast


class StopWhen:
    """When to stop a run.  At least one of ``target`` and ``min_gain`` is needed.

    Example::

        rule = StopWhen(target=2.1, min_gain=0.001)
        stop = rule.ask(step, n, lambda level: trainer.forecast(n, level=level), lambda: rates)

    Attributes:
        advice: of the last look; None before the first.
    """

    def __init__(
        self, *, target: float | None = None, min_gain: float | None = None, confidence: float = 0.95,
        only_tell: bool = False,
    ) -> None:  # fmt: skip
        """Args: target: final loss; the run stops when even the optimistic end lies above it.

        min_gain: share of the loss as it is now that the rest of the run has to bring at its optimistic end.
        confidence: 1 - the probability that a run is stopped that would have met its target or gain.
        only_tell: warn once instead of stopping.

        Raises:
            ConfigError: neither is said, or a value is out of range.
        """
        if target is None and min_gain is None:
            raise ConfigError("StopWhen needs target= (a final loss) or min_gain= (a share of the loss)")
        if target is not None and not (math.isfinite(target) and target > 0):
            raise ConfigError(f"target must be a loss above 0, not {target}")
        if min_gain is not None and not 0 < min_gain < 1:
            raise ConfigError(f"min_gain is a share between 0 and 1, not {min_gain}")
        if not 0.5 <= confidence < 1:
            raise ConfigError(f"confidence must be at least 0.5 and below 1, not {confidence}")
        self._target, self._min_gain, self._confidence, self._only_tell = target, min_gain, confidence, only_tell
        self._looked, self._told = 0, False
        self.advice: Advice | None = None

    def ask(
        self, step: int, total_steps: int, foretell: Callable[[float], Forecast], rates: Callable[[], Array]
    ) -> bool:
        """Whether to stop now.  Between two looks it costs a comparison.

        Args:
            step: Taken so far.
            total_steps: Of the whole run.
            foretell: Level of an interval -> forecast.
            rates: Learning rates of all steps, past and planned, (T,).
        """
        share = step / total_steps
        look = math.floor((share - FIRST_SHARE) / (1 - FIRST_SHARE) * NUM_LOOKS) + 1
        if share >= 1 or look <= self._looked:
            return False
        self._looked = look
        try:
            found = foretell(1 - 2 * (1 - self._confidence) / NUM_LOOKS)
        except ConfigError:  # too few losses, or one that no law has: nothing can be said
            return False
        reason = self._reason(found, step, rates)
        self.advice = Advice(bool(reason), reason, found)
        if reason and self._only_tell and not self._told:
            self._told = True
            warn(f"step {step}: {reason}")
        return bool(reason) and not self._only_tell

    def _reason(self, found: Forecast, step: int, rates: Callable[[], Array]) -> str:
        level = f"{100 * self._confidence:g} %"
        if self._target is not None and found.low > self._target:
            return (
                f"the target {self._target:.5g} will not be met: the final loss is forecast to be "
                f"{found.final_loss:.5g}, at least {found.low:.5g} (confidence {level})"
            )
        if self._min_gain is not None and fall_done(rates(), step) >= FALL_DONE:
            gain = 1 - found.low / found.last_value
            if gain < self._min_gain:
                return (
                    f"the rest of the run brings at most {100 * max(gain, 0.0):.3g} % of the loss "
                    f"{found.last_value:.5g} (confidence {level}), less than {100 * self._min_gain:g} %"
                )
        return ""


def fall_done(rates: Array, step: int) -> float:
    """Share of the rate's fall from its peak to its lowest later value that is over after a step; 1 without a fall.

    A schedule that rises again later has its fall before it.
    """
    ahead = rates[step:]
    if not len(ahead):
        return 1.0
    peak, now, lowest = float(rates.max()), float(rates[max(step - 1, 0)]), float(ahead.min())
    if max(float(ahead.max()), now) - lowest <= 1e-6 * peak:
        return 1.0
    return (peak - max(float(ahead.max()), now)) / max(peak - lowest, 1e-300)


__all__ = ["Advice", "StopWhen", "fall_done"]

"""Divergence signals, one pure function each, and the monitor that folds them into one alarm.

Thresholds and rulings: docs/design.md, "Divergence".  The oscillation signal works on the detrended,
smoothed loss: raw minibatch losses are near white noise and change sign in half of all steps on a
perfectly healthy run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..config.settings import DivergenceConfig
from ..numerics.running import newest
from ..records import Action, Alarm, Level, StateDict
from .history import History, Reading

#: Steps over which sign changes are counted, and of the moving average before that.
OSCILLATION_STEPS = 10
OSCILLATION_SMOOTHING = 5
#: Critical steps in a row after which a large gradient is taken for what is usual now, and steps above the warning.
LASTING, LASTING_WARNINGS = 3, 8
_KERNEL = np.full(OSCILLATION_SMOOTHING, 1 / OSCILLATION_SMOOTHING)
_LINE = np.stack([np.ones(OSCILLATION_STEPS), np.arange(OSCILLATION_STEPS, dtype=np.float64)], axis=1)
_NEEDED = OSCILLATION_STEPS + OSCILLATION_SMOOTHING - 1
_DETREND = np.eye(OSCILLATION_STEPS) - _LINE @ np.linalg.pinv(_LINE)  # residual of the least-squares line
#: (14, 10) losses of a window -> its smoothed and detrended steps.
_RESIDUAL = np.stack([_DETREND @ np.convolve(row, _KERNEL, mode="valid") for row in np.eye(_NEEDED)])


def loss_deviation(loss: float, mean: float, std: float, sigma: float, previous: float | None = None) -> Alarm:
    """Loss above its EMA: caution at 2/3 of ``sigma`` standard deviations, warning where that lasts.

    Losses have a long tail above: under skewed noise one healthy batch in 50 lies beyond three standard
    deviations.  Weights that went wrong stay wrong, so a warning takes two steps in a row above the
    caution line, or one beyond twice ``sigma``.  A shift of three is found as often as by a single step
    above ``sigma``, one step later; false warnings fall from 2.3 % to 0.5 % of steps at worst (LOG.md).
    Without a ``previous`` loss one step above ``sigma`` is a warning.
    """
    if not math.isfinite(loss):
        return Alarm(
            level=Level.CRITICAL, action=Action.SKIP_STEP, signal="loss_nonfinite", value=loss, threshold=math.inf
        )
    if not (math.isfinite(mean) and std > 1e-12 * max(1.0, abs(mean))):
        return Alarm()
    z = (loss - mean) / std
    lasting = z if previous is None else 1.5 * min(z, (previous - mean) / std)
    if lasting > sigma or z > 2 * sigma:
        return Alarm(level=Level.WARNING, action=Action.FORCE_FULL, signal="loss_deviation", value=z, threshold=sigma)
    if z > sigma * 2 / 3:
        return Alarm(level=Level.CAUTION, signal="loss_deviation", value=z, threshold=sigma * 2 / 3)
    return Alarm()


def gradient_explosion(norm: float, baseline: float, warning: float, critical: float) -> Alarm:
    """Gradient norm over its warm-up baseline: caution at 0.3 of ``warning``."""
    if not math.isfinite(norm):
        return Alarm(
            level=Level.CRITICAL, action=Action.SKIP_STEP, signal="gradient_nonfinite", value=norm, threshold=math.inf
        )
    if not baseline > 0:
        return Alarm()
    ratio = norm / baseline
    if ratio > critical:
        return Alarm(
            level=Level.CRITICAL, action=Action.ROLLBACK, signal="gradient_explosion", value=ratio, threshold=critical
        )
    if ratio > warning:
        return Alarm(
            level=Level.WARNING, action=Action.FORCE_FULL, signal="gradient_explosion", value=ratio, threshold=warning
        )
    if ratio > 0.3 * warning:
        return Alarm(level=Level.CAUTION, signal="gradient_explosion", value=ratio, threshold=0.3 * warning)
    return Alarm()


def gradient_vanishing(
    recent_norms: Sequence[float], baseline: float, threshold: float, loss: float, loss_baseline: float
) -> Alarm:
    """Gradient norm far below its baseline for 10 steps in a row, though the loss has not come down.

    Near a minimum the gradient vanishes because it should (for a quadratic the loss falls with its
    square); a physics-informed network's falls a thousandfold on the way to success.
    """
    if len(recent_norms) < 10 or not baseline > 0 or loss < 0.1 * loss_baseline:
        return Alarm()
    ratio = max(list(recent_norms)[-10:]) / baseline
    if ratio < threshold:
        return Alarm(
            level=Level.WARNING, action=Action.FORCE_FULL, signal="gradient_vanishing", value=ratio, threshold=threshold
        )
    return Alarm()


def prediction_error(
    actual: float, predicted: float, caution: float, correct: float, critical: float, noise: float = 0.0
) -> Alarm:
    """Loss above the predicted one.  Compared by multiplication: near zero a ratio would be noise.

    ``noise`` is the standard error of ``actual`` (a single loss: its standard deviation; the mean of a
    probation: that over the root of its steps).  Up to three of them are the batches, not the prediction.
    """
    if not (math.isfinite(actual) and math.isfinite(predicted)):
        return Alarm()
    error, scale = actual - predicted, abs(predicted)
    relative = error / scale if scale > 0 else math.inf if error > 0 else 0.0
    slack = 3 * noise if math.isfinite(noise) else 0.0
    if error > critical * scale + slack:
        return Alarm(
            level=Level.CRITICAL, action=Action.ROLLBACK, signal="prediction_error", value=relative, threshold=critical
        )
    if error > correct * scale + slack:
        return Alarm(
            level=Level.WARNING, action=Action.CORRECT, signal="prediction_error", value=relative, threshold=correct
        )
    if abs(error) > caution * scale + slack:
        return Alarm(level=Level.CAUTION, signal="prediction_error", value=relative, threshold=caution)
    return Alarm()


def sign_changes(losses: Sequence[float]) -> tuple[int, float]:
    """Sign changes of the detrended, smoothed loss over the last 10 steps, and its RMS."""
    if len(losses) < _NEEDED:
        return 0, 0.0
    smoothed = np.correlate(np.array(losses[-_NEEDED:], dtype=np.float64), _KERNEL, mode="valid")  # even: no reversal
    residual = _DETREND @ smoothed
    above = [value > 0 for value in residual.tolist() if value != 0]
    return sum(a != b for a, b in pairwise(above)), math.sqrt(float(residual @ residual) / OSCILLATION_STEPS)


def _usual_width(losses: Sequence[float]) -> float | None:
    """Median RMS, as of :func:`sign_changes`, over the 64 steps before the last 14; None where there are too few."""
    ends = [len(losses) - back for back in range(14, min(78, len(losses) - 13), 8)]
    if not ends:
        return None
    residuals = np.array([losses[end - _NEEDED : end] for end in ends]) @ _RESIDUAL
    squares = sorted(np.einsum("ij,ij->i", residuals, residuals).tolist())
    return math.sqrt(squares[len(squares) // 2] / OSCILLATION_STEPS)


def oscillation(losses: Sequence[float], max_changes: int) -> Alarm:
    """More than ``max_changes`` sign changes, wider than usual: the weights swing across a valley.

    Width counts because a healthy loss changes sign too (smoothed white noise more than 3 times in 10
    steps about every sixth time): the swing must be three times the median of the 64 steps before.
    """
    changes, width = sign_changes(newest(losses, _NEEDED))
    if changes <= max_changes:
        return Alarm()
    usual = _usual_width(list(losses))
    if usual is None or not width > 3 * usual:
        return Alarm()
    return Alarm(level=Level.WARNING, action=Action.CORRECT, signal="oscillation", value=changes, threshold=max_changes)


def low_confidence(confidence: float, enter: float, leave: float) -> Alarm:
    """Confidence of a prediction under way: caution below ``enter``, warning below ``leave``."""
    if confidence < leave:
        return Alarm(
            level=Level.WARNING, action=Action.FORCE_FULL, signal="confidence", value=confidence, threshold=leave
        )
    if confidence < enter:
        return Alarm(level=Level.CAUTION, signal="confidence", value=confidence, threshold=enter)
    return Alarm()


def worst(alarms: Sequence[Alarm]) -> Alarm:
    """The most severe alarm, the first among equals."""
    return max(alarms, key=lambda alarm: alarm.level, default=Alarm())


class Monitor:
    """Watches readings; keeps only what deciding on an action needs."""

    def __init__(self, config: DivergenceConfig, sigma: float) -> None:
        """Args: config: thresholds.  sigma: of the loss deviation."""
        self.config = config
        self.sigma = sigma
        self.num_consecutive_critical = self.num_large = 0

    def check(self, reading: Reading, history: History, *, warming_up: bool, exact: bool = False) -> Alarm:
        """Alarm of one real step, judged against the history *before* that step.

        During warm-up only non-finite values count: there is no baseline yet.

        Args:
            reading: Loss and gradient norm of the step.
            history: Of the steps before.
            warming_up: Whether the baselines are still being made.
            exact: Losses are free of noise.
        """
        c = self.config
        norm = reading.gradient_norm
        previous = history.losses[-1] if history.losses else None
        alarms = [loss_deviation(reading.loss, history.loss_ema.mean, history.loss_ema.std, self.sigma, previous)]
        if norm is not None:
            baseline = history.norm_baseline.mean
            # where every batch is the same a step that is skipped for its gradient is skipped for ever
            critical = math.inf if exact and reading.finite else c.critical_multiplier
            alarms.append(gradient_explosion(norm, baseline, c.gradient_norm_multiplier, critical))
            large = not warming_up and reading.finite and norm > c.gradient_norm_multiplier * baseline > 0
            self.num_large = self.num_large + 1 if large else 0
            vanishing = gradient_vanishing(
                history.norms, baseline, c.vanishing_gradient_threshold, reading.loss, history.loss_baseline.mean
            )
            alarms.append(vanishing)
        alarms.append(oscillation(history.losses, c.max_sign_changes))
        alarm = worst(alarms)
        if warming_up and reading.finite:
            alarm = Alarm()
        self.num_consecutive_critical = self.num_consecutive_critical + 1 if alarm.level is Level.CRITICAL else 0
        return self._escalated(alarm)

    @property
    def lasts(self) -> bool:
        """Whether gradients were so large for so many steps that the next one is no outlier: what is usual has changed.

        The weights stay where they are while steps are skipped, and the batches are others each time.
        """
        return self.num_consecutive_critical >= LASTING or self.num_large >= LASTING_WARNINGS

    def outgrown(self, reading: Reading, history: History) -> bool:
        """Whether a gradient that would be critical is usual now, so that the baseline has to begin anew."""
        limit = self.config.critical_multiplier * history.norm_baseline.mean
        norm = reading.gradient_norm
        return self.lasts and reading.finite and norm is not None and norm > limit > 0

    def _escalated(self, alarm: Alarm) -> Alarm:
        """Skipping does not help a run whose every step is bad: after too many, give up clearly."""
        if self.num_consecutive_critical > self.config.max_consecutive_nonfinite:
            return Alarm(
                level=Level.CRITICAL, action=Action.ABORT, signal=alarm.signal,
                value=self.num_consecutive_critical, threshold=self.config.max_consecutive_nonfinite,
            )  # fmt: skip
        return alarm

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {"num_consecutive_critical": self.num_consecutive_critical, "num_large": self.num_large}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.num_consecutive_critical = state["num_consecutive_critical"]
        self.num_large = state["num_large"]

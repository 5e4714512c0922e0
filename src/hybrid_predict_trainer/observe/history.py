"""What a run remembers of itself: bounded buffers and running statistics of plain numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..numerics.running import Baseline, RunningMoments, newest, slope
from ..numerics.tail import Tail
from ..numerics.thinned import ThinnedCurve
from ..records import StateDict
from ..weights import algebra as weights

LOSS_CAPACITY = 256
NORM_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """Loss and gradient norm of one step, on the host; the loss is what is judged by."""

    step: int
    loss: float
    gradient_norm: float | None
    decay: float = 0.0  # what of the loss is weight decay's

    @property
    def finite(self) -> bool:
        """Whether both numbers are usable."""
        return math.isfinite(self.loss) and (self.gradient_norm is None or math.isfinite(self.gradient_norm))

    @property
    def overflowed(self) -> bool:
        """Whether the loss is a number and its gradient is not."""
        return math.isfinite(self.loss) and not self.finite


class Readout:
    """Reads losses and norms from the device without making every step wait for it.

    On the CPU a reading is available at once.  On an accelerator scalars queue up and are fetched
    together every ``interval`` steps: one wait per interval, as a loop that logs has anyway.
    """

    def __init__(self, interval: int) -> None:
        """Args: interval: steps between two fetches from an accelerator."""
        self.interval = interval
        self._pending: list[tuple[int, Tensor, Tensor | None, Tensor | None]] = []

    def push(self, step: int, loss: Tensor, gradient_norm: Tensor | None, decay: Tensor | None = None) -> None:
        """Queue the scalars of one step; ``decay``: what weight decay adds to the loss."""
        self._pending.append((step, loss, gradient_norm, decay))

    @property
    def waiting(self) -> bool:
        """Whether some scalars have not been read yet."""
        return bool(self._pending)

    @property
    def due(self) -> bool:
        """Whether :meth:`read` would return something without being forced."""
        return bool(self._pending) and (self._pending[0][1].device.type == "cpu" or len(self._pending) >= self.interval)

    def read(self, *, force: bool = False) -> list[Reading]:
        """Readings that are due, oldest first."""
        if not self._pending or not (force or self.due):
            return []
        pending, self._pending = self._pending, []
        if len(pending) == 1:
            step, loss, norm, decay = pending[0]
            return [_reading(step, float(loss), None if norm is None else float(norm), decay)]
        known = [t.detach().float() for _, *three in pending for t in three if t is not None]
        fetched: Iterator[float] = iter(weights.on_host(known).tolist())
        return [
            _reading(
                step, next(fetched), None if norm is None else next(fetched), None if decay is None else next(fetched)
            )
            for step, _, norm, decay in pending
        ]


def _reading(step: int, loss: float, norm: float | None, decay: Tensor | float | None) -> Reading:
    added = 0.0 if decay is None else float(decay)
    return Reading(step, loss + added, norm, added)


class History:
    """Loss and gradient-norm memory of a run; real steps only."""

    def __init__(self) -> None:
        """Start empty."""
        self.losses: deque[float] = deque(maxlen=LOSS_CAPACITY)
        self.norms: deque[float] = deque(maxlen=NORM_CAPACITY)
        self.loss_ema = RunningMoments(decay=0.95)
        self.norm_baseline = Baseline()
        self.loss_baseline = Baseline()
        self._windows = Tail(3, 256)  # step, mean loss, its logarithm, asked for again and again

    def push(self, reading: Reading, *, warming_up: bool) -> None:
        """Add a finite reading; warm-up readings also make the baselines."""
        self.losses.append(reading.loss)
        self.loss_ema.push(reading.loss)
        if reading.gradient_norm is not None:
            self.norms.append(reading.gradient_norm)
        if warming_up:
            self.loss_baseline.push(reading.loss)
            if reading.gradient_norm is not None:
                self.norm_baseline.push(reading.gradient_norm)

    def begin_losses_anew(self) -> None:
        """Weights of long before have come back: the losses since are no measure of those that follow."""
        self.losses.clear()
        self.loss_ema = RunningMoments(decay=0.95)

    def begin_norms_anew(self, norm: float) -> None:
        """Gradients have another size for good, after the loss was scaled say: from here on this one is usual."""
        self.norms.clear()
        self.norm_baseline = Baseline()
        self.norm_baseline.push(norm)

    @property
    def loss_ema_stable(self) -> bool:
        """Whether the smoothed loss is known and no longer exploding: below what warm-up began with."""
        if self.loss_ema.count < 2 or not math.isfinite(self.loss_ema.mean):
            return False
        return self.loss_ema.mean <= self.loss_baseline.high + 1e-12

    def close_window(self, step: int, num_steps: int) -> float:
        """Trimmed mean loss over the last ``num_steps`` steps, remembered for the slope.

        A fifth is dropped at either end: at a high learning rate the loss has spikes ten times its
        usual value, which in a plain mean hide any progress.
        """
        recent = sorted(newest(self.losses, num_steps))
        cut = len(recent) // 5
        kept = recent[cut : len(recent) - cut]
        mean = sum(kept) / len(kept) if kept else math.nan
        self._windows.push((step, mean, _log(mean)))
        return mean

    def mean_norm(self, num_steps: int) -> float:
        """Mean gradient norm over the last steps (at most the buffer's 64), 0 if none is known."""
        recent = newest(self.norms, num_steps)
        return sum(recent) / len(recent) if recent else 0.0

    def loss_slope(self) -> float:
        """Change of the training loss per real step (negative while it falls), 0 if unknown.

        From a least-squares line through the log of the window means of the latter half of the run,
        times the present loss: the second half because the whole run's slope would be the steep
        beginning's, the log because a loss that falls over decades has no other common slope, and a
        long stretch because a high learning rate makes single windows jump up and down.  Progress by
        accepted jumps is included, which makes the pace of real training look faster and credits
        smaller: the careful side.
        """
        steps, means, logs = self._windows.newest(max(4, len(self._windows) // 2))
        if len(steps) < 3:
            return 0.0
        if means[0] > 0 and np.fmin.reduce(means) > 0:
            recent = logs[-4:].tolist()
            return slope(steps, logs) * math.exp(sum(recent) / len(recent))
        return slope(steps, means)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "losses": list(self.losses), "norms": list(self.norms), "loss_ema": self.loss_ema.state_dict(),
            "norm_baseline": self.norm_baseline.state_dict(), "loss_baseline": self.loss_baseline.state_dict(),
            "window_losses": [[int(step), mean] for step, mean, _ in self._windows.rows()],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.losses = deque(state["losses"], maxlen=LOSS_CAPACITY)
        self.norms = deque(state["norms"], maxlen=NORM_CAPACITY)
        self.loss_ema.load_state_dict(state["loss_ema"])
        self.norm_baseline.load_state_dict(state["norm_baseline"])
        self.loss_baseline.load_state_dict(state["loss_baseline"])
        self._windows.refill((int(step), float(mean), _log(float(mean))) for step, mean in state["window_losses"])


def _log(loss: float) -> float:
    return math.log(loss) if loss > 0 else math.nan


class Losses:
    """Losses and gradient norms of the real steps: those still on the device, and those that were read.

    Attributes:
        readout: Brings them to the host.
        history: What is remembered of them.
        curve: The whole run in blocks, by the position of the clock; for a forecast of its end.
    """

    def __init__(self, interval: int) -> None:
        """Args: interval: steps between two fetches from an accelerator."""
        self.readout = Readout(interval)
        self.history = History()
        self.curve = ThinnedCurve()

    def push(self, step: int, loss: Tensor, gradient_norm: Tensor | None, decay: Tensor | None = None) -> None:
        """Queue the scalars of one step; ``decay``: what weight decay adds to the loss in what is judged by."""
        self.readout.push(step, loss, gradient_norm, decay)

    def read(self, *, force: bool = False) -> list[Reading]:
        """Readings that are due, oldest first; :meth:`keep` remembers the good ones."""
        return self.readout.read(force=force)

    def keep(self, reading: Reading, *, warming_up: bool, position: int, rate: float) -> None:
        """Remember a reading that raised no alarm, and where the run's clock and learning rate were."""
        self.history.push(reading, warming_up=warming_up)
        self.curve.push(position, reading.loss - reading.decay, rate)  # a forecast is of the user's own loss

    def newest(self, num: int) -> list[float]:
        """The last losses, oldest first."""
        return newest(self.history.losses, num)

    def state_dict(self) -> StateDict:
        """Plain containers; what waits to be read is read before a checkpoint."""
        return {**self.history.state_dict(), "curve": self.curve.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.history.load_state_dict(state)
        self.curve.load_state_dict(state["curve"])

"""What a run remembers of itself: bounded buffers and running statistics of plain numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..numerics.running import Baseline, RunningMoments, slope
from ..numerics.thinned import ThinnedCurve
from ..records import StateDict
from ..weights import algebra as weights

LOSS_CAPACITY = 256
NORM_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """Loss and gradient norm of one step, on the host."""

    step: int
    loss: float
    gradient_norm: float | None

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
        self._pending: list[tuple[int, Tensor, Tensor | None]] = []

    def push(self, step: int, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Queue the scalars of one step."""
        self._pending.append((step, loss, gradient_norm))

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
            step, loss, norm = pending[0]
            return [Reading(step, float(loss), None if norm is None else float(norm))]
        known = [t.detach().float() for _, *pair in pending for t in pair if t is not None]
        fetched: Iterator[float] = iter(weights.on_host(known).tolist())
        return [Reading(step, next(fetched), None if norm is None else next(fetched)) for step, _, norm in pending]


class History:
    """Loss and gradient-norm memory of a run; real steps only."""

    def __init__(self) -> None:
        """Start empty."""
        self.losses: deque[float] = deque(maxlen=LOSS_CAPACITY)
        self.norms: deque[float] = deque(maxlen=NORM_CAPACITY)
        self.loss_ema = RunningMoments(decay=0.95)
        self.norm_baseline = Baseline()
        self.loss_baseline = Baseline()
        self._window_losses: deque[tuple[int, float]] = deque(maxlen=256)  # (step, mean)
        self._window_logs: deque[tuple[int, float]] = deque(
            maxlen=256
        )  # (step, its logarithm), asked for again and again

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
        recent = sorted(list(self.losses)[-num_steps:])
        cut = len(recent) // 5
        kept = recent[cut : len(recent) - cut]
        mean = sum(kept) / len(kept) if kept else math.nan
        self._window_losses.append((step, mean))
        self._window_logs.append((step, _log(mean)))
        return mean

    def mean_norm(self, num_steps: int) -> float:
        """Mean gradient norm over the last steps (at most the buffer's 64), 0 if none is known."""
        recent = list(self.norms)[-num_steps:]
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
        points = list(self._window_losses)
        num_latter = max(4, len(points) // 2)
        points = points[-num_latter:]
        if len(points) < 3:
            return 0.0
        if min([loss for _, loss in points]) > 0:
            logs = list(self._window_logs)[-num_latter:]
            recent = [log for _, log in logs[-4:]]
            return slope(logs) * math.exp(sum(recent) / len(recent))
        return slope(points)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "losses": list(self.losses), "norms": list(self.norms), "loss_ema": self.loss_ema.state_dict(),
            "norm_baseline": self.norm_baseline.state_dict(), "loss_baseline": self.loss_baseline.state_dict(),
            "window_losses": [list(pair) for pair in self._window_losses],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.losses = deque(state["losses"], maxlen=LOSS_CAPACITY)
        self.norms = deque(state["norms"], maxlen=NORM_CAPACITY)
        self.loss_ema.load_state_dict(state["loss_ema"])
        self.norm_baseline.load_state_dict(state["norm_baseline"])
        self.loss_baseline.load_state_dict(state["loss_baseline"])
        self._window_losses = deque(((int(s), float(v)) for s, v in state["window_losses"]), maxlen=256)
        self._window_logs = deque(((s, _log(v)) for s, v in self._window_losses), maxlen=256)


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

    def push(self, step: int, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Queue the scalars of one step."""
        self.readout.push(step, loss, gradient_norm)

    def read(self, *, force: bool = False) -> list[Reading]:
        """Readings that are due, oldest first; :meth:`keep` remembers the good ones."""
        return self.readout.read(force=force)

    def keep(self, reading: Reading, *, warming_up: bool, position: int, rate: float) -> None:
        """Remember a reading that raised no alarm, and where the run's clock and learning rate were."""
        self.history.push(reading, warming_up=warming_up)
        self.curve.push(position, reading.loss, rate)

    def newest(self, num: int) -> list[float]:
        """The last losses, oldest first."""
        return list(self.history.losses)[-num:]

    def state_dict(self) -> StateDict:
        """Plain containers; what waits to be read is read before a checkpoint."""
        return {**self.history.state_dict(), "curve": self.curve.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.history.load_state_dict(state)
        self.curve.load_state_dict(state["curve"])

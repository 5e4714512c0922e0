"""Progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ..records import Phase, StepResult
from ..trainer import HybridTrainer

#: Seconds between two drawings of the bar.
REFRESH_S = 0.1
WIDTH = 24


class Progress:
    """Called after every step of a run; reads the loss only where it shows it."""

    def __init__(
        self, trainer: HybridTrainer, total_steps: int, *, name: str = "", stream: TextIO | None = None
    ) -> None:
        """Args: trainer: at the start.  total_steps: end of its clock.  name: put in front.  stream: stderr if None."""
        self._trainer, self._total, self._name = trainer, total_steps, f"{name}: " if name else ""
        self._stream = stream if stream is not None else sys.stderr
        self._bar = self._stream.isatty()
        self._interval = trainer.config.metrics.log_interval
        self._started = self._drawn = time.perf_counter()
        self._first = trainer.run.position
        self._last_line = 0
        self._gone = False

    def __call__(self, result: StepResult) -> None:
        """Draw the bar, or print a line every ``log_interval`` steps."""
        now = time.perf_counter()
        if result.phase is Phase.PREDICT:
            return  # its loss is the gate's
        if self._bar and now - self._drawn >= REFRESH_S:
            self._drawn = now
            self._write(f"\r\x1b[2K{self.line(result, now)}")
        elif not self._bar and result.step - self._last_line >= self._interval:
            self._last_line = result.step - result.step % self._interval
            self._write(self.line(result, now) + "\n")

    def _write(self, text: str) -> None:
        """Write, unless the terminal has been closed: that ends no run."""
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._gone = True

    def line(self, result: StepResult, now: float) -> str:
        """Phase, step, loss, jumps, speed, time left."""
        c, position = self._trainer.run.meter, min(self._trainer.run.position, self._total)
        rate = (position - self._first) / max(now - self._started, 1e-9)
        left = f"{(self._total - position) / rate:.0f} s left" if rate > 0 else "? left"
        filled = WIDTH * position // max(self._total, 1)
        bar = f"[{'#' * filled}{'.' * (WIDTH - filled)}] " if self._bar else ""
        return (
            f"{self._name}{bar}{position}/{self._total} {result.phase.value:<7} loss {result.loss:.5g}  "
            f"jumps {c.num_jumps_accepted}/{c.num_jumps_proposed}  {rate:.1f} steps/s  {left}"
        )

    def close(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._bar:
            self._write("\r\x1b[2K")

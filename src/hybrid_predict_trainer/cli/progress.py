"""Progress of a run: a bar on a terminal, tqdm's in a notebook, plain lines on standard error elsewhere.

In a loop of one's own: ``trainer.fit(loader, total_steps=n, progress_callback=Progress(trainer, n))``.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any, TextIO

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
        self._error = ""
        self._notebook: Any = _notebook_bar(total_steps, self._first, name) if stream is None else None

    def __call__(self, result: StepResult) -> None:
        """Draw the bar, or print a line every ``log_interval`` steps."""
        now = time.perf_counter()
        if result.phase is Phase.PREDICT:
            return  # its loss is the gate's
        if self._notebook is not None:
            self._draw_in_notebook(self._notebook, result, now)
            return
        if self._bar and now - self._drawn >= REFRESH_S:
            self._drawn = now
            self._write(f"\r\x1b[2K{self.line(result, now)}")
        elif not self._bar and result.step - self._last_line >= self._interval:
            self._last_line = result.step - result.step % self._interval
            self._write(self.line(result, now) + "\n")

    def show_error(self, error: float) -> None:
        """From here on: the relative L2 error against the true solution, as it was measured last."""
        self._error = f"rel. error {error:.1e}  "

    def _draw_in_notebook(self, bar: Any, result: StepResult, now: float) -> None:
        """tqdm knows the speed and the time left; the loss is read only where it is shown."""
        position = min(self._trainer.run.position, self._total)
        if now - self._drawn < REFRESH_S and position < self._total:
            return
        self._drawn = now
        c = self._trainer.run.meter
        jumps = f"{c.num_jumps_accepted}/{c.num_jumps_proposed}"
        bar.set_postfix({"phase": result.phase.value, "loss": f"{result.loss:.5g}", "jumps": jumps}, refresh=False)
        bar.update(position - bar.n)

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
            f"{self._error}"
            f"jumps {c.num_jumps_accepted}/{c.num_jumps_proposed}  {rate:.1f} steps/s  {left}"
        )

    def close(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._notebook is not None:
            self._notebook.close()
        elif self._bar:
            self._write("\r\x1b[2K")


def _notebook_bar(total: int, first: int, name: str) -> Any:
    """tqdm's bar where this is a notebook and tqdm is installed, else None."""
    if "ipykernel" not in sys.modules or importlib.util.find_spec("tqdm") is None:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=first, desc=name or None, unit="step")

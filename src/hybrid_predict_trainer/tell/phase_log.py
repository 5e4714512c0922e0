"""What a run does as a log of blocks, one per phase: for a terminal or a file that a person reads.

``trainer.fit(loader, total_steps=n, progress_callback=PhaseLog(trainer))``, or ``hpt train --log phases``.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, TextIO

from ..records import Phase, StepResult

if TYPE_CHECKING:
    from ..trainer import HybridTrainer

#: Words of a phase's head.
HEADS = {Phase.WARMUP: "WARMUP", Phase.FULL: "FULL TRAIN", Phase.PREDICT: "PREDICT", Phase.CORRECT: "CORRECT"}


class PhaseLog:
    """Called after every step; writes a head where a phase begins, some of its steps, and what came of it.

    Losses and norms are read at the steps that are shown, and at the ends of a block only.
    """

    def __init__(self, trainer: HybridTrainer, *, stream: TextIO | None = None, every: int | None = None) -> None:
        """Bind.

        Args:
            trainer: Whose steps these are.
            stream: Where lines go; None: standard error.
            every: Steps of a block between two that are shown; None: ``metrics.log_interval``.
        """
        self._trainer, self._stream = trainer, stream if stream is not None else sys.stderr
        self._every = every or trainer.config.metrics.log_interval
        self._phase: Phase | None = None
        self._first = 0  # step at which the block began
        self._last: StepResult | None = None
        self._cycle = 0
        self._gone = False

    def __call__(self, result: StepResult) -> None:
        """Go on with the block, or end it and begin the next."""
        if result.phase is not self._phase:
            self._end()
            self._begin(result)
        elif (result.step - self._first) % self._every == 0:
            self._write(self._line(result))
        self._last = result
        if result.phase is Phase.PREDICT:
            self._write(_judged(result))

    def close(self) -> None:
        """End the last block and say what was done to the optimizer's own steps."""
        self._end()
        run = self._trainer.run
        c, scale = run.meter, run.optimizer_step.scale
        self._write(
            f"\nAll {c.num_steps} steps: {c.num_real_steps} real, jumps accepted {c.num_jumps_accepted} of "
            f"{c.num_jumps_proposed}, learning rate times {scale.learned:g}, group warm-up cuts {scale.num_cuts}"
        )

    def _begin(self, result: StepResult) -> None:
        if self._phase is not Phase.FULL and result.phase is Phase.FULL:
            self._cycle += 1
        self._phase, self._first, self._last = result.phase, result.step, None
        cycle = f" (cycle {self._cycle})" if self._cycle else ""
        head = f"Step {result.step}: {HEADS[result.phase]}{cycle}"
        self._write(f"\n{head}\n{'-' * len(head)}")
        if result.phase is not Phase.PREDICT:
            self._write(self._line(result))

    def _end(self) -> None:
        last = self._last
        if last is None or self._phase in (None, Phase.PREDICT):
            return
        assert self._phase is not None
        number = last.step - self._first + 1
        self._write(f"  {HEADS[self._phase].lower()} complete | {number} steps | loss {last.loss:.5g}")

    def _line(self, result: StepResult) -> str:
        norm = result.gradient_norm
        told = f" | grad {norm:.3g}" if norm is not None and math.isfinite(norm) else ""
        confidence = "" if result.phase is Phase.WARMUP else f" | conf {result.confidence:.2f}"
        mark = " | skipped" if result.skipped else ""
        rate = self._trainer.run.learning_rate
        return f"Step {result.step:>6} | loss {result.loss:.5g}{told} | lr {rate:.2e}{confidence}{mark}"

    def _write(self, text: str) -> None:
        """Write, unless the terminal has been closed: that ends no run."""
        if self._gone:
            return
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._gone = True


def _judged(result: StepResult) -> str:
    """What the gate made of a proposal."""
    verdict = result.verdict
    if verdict is None or not verdict.accepted:
        return f"Step {result.step:>6} | refused: {result.reason}"
    error = "" if result.prediction_error is None else f" | predicted {result.prediction_error:.1%} off"
    return (
        f"Step {result.step:>6} | loss {verdict.loss_before:.5g} to {verdict.loss_after:.5g}{error} | stands for "
        f"{result.num_claimed_steps} steps | conf {result.confidence:.2f}"
    )

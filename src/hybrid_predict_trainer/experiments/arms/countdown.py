"""How long a benchmark of many runs still takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..run_arm import ArmRun

Tell = Callable[[str], None]


class Countdown:
    """What is left to do and how long that may take, from the pace of the runs so far."""

    def __init__(self, left: Mapping[str, float], runs: int, tell: Tell) -> None:
        """Args: left: case -> steps still to be trained.  runs: how many.  tell: prints a line."""
        self._left, self._runs, self._tell = dict(left), runs, tell
        self._steps: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._num_done = 0

    def seconds_left(self) -> float | None:
        """None until a run has ended; cases not yet begun are taken to be as slow as the others were."""
        total = sum(self._steps.values())
        if not total:
            return None
        usual = sum(self._seconds.values()) / total
        pace = {case: self._seconds[case] / steps for case, steps in self._steps.items() if steps}
        return sum(max(0.0, left) * pace.get(case, usual) for case, left in self._left.items())

    def done(self, case: str, label: str, steps: float, run: ArmRun, seconds: float | None) -> None:
        """A run has ended.

        Args:
            case: Whose.
            label: Of the line.
            steps: That were planned for it, divided by how many run at a time.
            run: What came out.
            seconds: It took; None: it was stored, about which nothing is said.
        """
        self._num_done += 1
        self._left[case] -= steps
        if seconds is None:
            return
        self._steps[case] = self._steps.get(case, 0.0) + steps
        self._seconds[case] = self._seconds.get(case, 0.0) + seconds
        loss = f"diverged: {run.error}" if run.error else f"validation loss {run.final_val_loss:.5g}"
        told = readable(self.seconds_left() or 0.0)
        self._tell(f"[{self._num_done}/{self._runs}] {label}: {loss}, {run.wall_s:.1f} s; {told} left")


def readable(seconds: float) -> str:
    """About how long: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

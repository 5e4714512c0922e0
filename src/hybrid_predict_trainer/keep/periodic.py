"""Checkpoints while a run goes on: every so many steps, and one that cannot be written ends no run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..distributed.collective import ALONE, Collective
from ..notices import warn
from ..records import CheckpointError
from .background import BackgroundWriter, Write
from .housekeeping import checkpoints
from .manifest import CHECKPOINT_NAME


class PeriodicSaver:
    """Writes a checkpoint whenever an interval has passed.

    A folder that holds the checkpoints of another run is not written to: the newest of them would be taken for this
    run's, and the older ones would be deleted.

    Attributes:
        saved: Step of the newest checkpoint that was written or loaded, -1 if there is none.
    """

    def __init__(
        self,
        directory: str | Path,
        interval: int,
        save: Callable[[Path], object],
        capture: Callable[[Path], Write] | None = None,
        ranks: Collective = ALONE,
    ) -> None:
        """Bind.

        Args:
            directory: Made if missing.
            interval: Steps between two checkpoints.
            save: Writes one below a directory.
            capture: Copies what one would hold and returns what writes it: those of the interval are then written
                while training goes on.  None: they are not.
            ranks: That come here together; the first one writes.
        """
        self.directory, self._interval, self._save, self._capture = Path(directory), interval, save, capture
        self._ranks = ranks
        self.saved = -1
        self._tried = 0  # step of the last attempt: one that fails is tried again at the next interval
        self._looked = self._failing = False
        self._writer, self._under_way = BackgroundWriter(), -1

    def loaded(self, path: Path, step: int) -> None:
        """The run goes on from a checkpoint; if it is one of this folder the others there are of the same run."""
        self._settle()
        self.saved = self._tried = step
        self._looked = path.resolve().parent == self.directory.resolve()

    def due(self, step: int) -> bool:
        """Whether an interval has ended since the last attempt."""
        return step // self._interval > self._tried // self._interval

    def save(self, step: int) -> None:
        """Write one, unless the newest is of this step; it is there when this returns.

        Args:
            step: Of the run, between two steps.

        Raises:
            CheckpointError: it could not be written.
        """
        self._tried = step
        self._settle()  # one that failed is made up for by the one that is written now
        if self._is_saved(step):
            return
        self._ranks.alone_does(self._refuse_those_of_another_run)
        self._save(self.directory)
        self.saved, self._looked = step, True

    def attempt(self, step: int) -> CheckpointError | None:
        """:meth:`save`, whose failure is returned; it is said once until one is written again."""
        return self._told(lambda: self.save(step))

    def keep_up(self, step: int) -> CheckpointError | None:
        """As :meth:`attempt`, for a run that goes on: where it may be, it is written in the background.

        While one is still being written nothing is done, and the next step asks again.
        """
        if self._capture is None:
            return self.attempt(step)
        if self._ranks.first_of(lambda: [self._writer.busy])[0]:
            return None
        return self._told(lambda: self._begin(step))

    def _begin(self, step: int) -> None:
        assert self._capture is not None
        failed = self._settle()
        self._tried = step
        if not self._is_saved(step):
            self._ranks.alone_does(self._refuse_those_of_another_run)
            self._writer.start(self._capture(self.directory))
            self._under_way, self._looked = step, True
        if failed is not None:
            raise failed

    def _is_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is of this step."""
        return bool(self._ranks.first_of(lambda: [step == self.saved])[0])

    def _settle(self) -> CheckpointError | None:
        """Wait for the one that is being written; returns why it could not be."""
        under_way, self._under_way = self._under_way, -1
        try:
            self._writer.wait()
        except CheckpointError as error:
            return error
        self.saved = max(self.saved, under_way)
        return None

    def _told(self, save: Callable[[], None]) -> CheckpointError | None:
        try:
            save()
        except CheckpointError as error:
            if not self._failing:
                kept = "there is none yet" if self.saved < 0 else f"the newest is of step {self.saved}"
                warn(f"{error}; training goes on, and the next interval tries again ({kept})")
            self._failing = True
            return error
        self._failing = False
        return None

    def _refuse_those_of_another_run(self) -> None:
        found = [] if self._looked else checkpoints(self.directory)
        if not found:
            return
        match = CHECKPOINT_NAME.match(found[-1].name)
        newest = match[1] if match else "?"
        raise CheckpointError(
            f"{self.directory} holds checkpoints of another run, up to step {newest}: load one to continue that run, "
            "or set checkpoint.directory to another folder"
        )
